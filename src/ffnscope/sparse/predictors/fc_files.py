"""Low-rank predictors as PowerInfer and ProSparse exchange them: a file ``model_<layer>.pt`` per layer.

Each holds ``fc1.weight`` [rank, d_model] and ``fc2.weight`` [d_ff, rank] (SVDP's also ``fc2.bias``), with a ReLU
between. Theirs read the residual stream before the norm of the FFN, ours the input of the FFN behind it. For an RMS
norm with the weights w this is that times w over a positive number per token. So without a bias, columns of fc1 times
(or over) w turn one kind into the other; the signs of the logits, and PowerInfer's selection at the threshold 0, stay.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.io import replacing
from ffnscope.sparse.predictors.low_rank import LowRank


def write_fc_predictors(
    folder: Path, predictors: Sequence[LowRank], norm_weights: Sequence[Tensor] | None = None
) -> None:
    """Write a file per layer, in their order.

    Args:
        folder: a new or empty folder.
        predictors: one for each layer of the model, with a ReLU between their matrices.
        norm_weights: of the norm before each FFN [d_model], to write predictors that read what is before it; None
            writes them as they are, for a program that gives them the input of the FFN.

    Raises:
        UsageError: a predictor without ReLU, one that looks ahead, or other numbers of norms and predictors.
        ArtifactError: the folder holds something, or cannot be written.
    """
    if not predictors or (norm_weights is not None and len(norm_weights) != len(predictors)):
        n_norms = "no" if norm_weights is None else len(norm_weights)
        raise UsageError(f"one predictor per layer is written, and a norm for each; got {len(predictors)}, {n_norms}.")
    for layer, one in enumerate(predictors):
        if not one.relu or one.lookahead:
            raise UsageError(
                f"the predictor of layer {layer} has {'a lookahead' if one.lookahead else 'no ReLU'}; the format is "
                "for predictors of their own layer with a ReLU. Train with relu=True and lookahead=0."
            )
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} is not empty. Choose another folder.")
    for layer, one in enumerate(predictors):
        state = {name: value.detach().cpu().clone() for name, value in one.state_dict().items()}
        if norm_weights is not None:
            weight = norm_weights[layer].detach().cpu()
            state["fc1.weight"] = (state["fc1.weight"].double() * weight.double()).to(state["fc1.weight"].dtype)
        with replacing(folder / f"model_{layer}.pt") as part:
            torch.save(state, part)


def read_fc_predictors(
    folder: Path, ffns: Sequence[FFN], norm_weights: Sequence[Tensor] | None = None, *, relu: bool = True
) -> list[LowRank]:
    """Read a predictor for each FFN of a model from ``model_0.pt``, ``model_1.pt``, ...

    Args:
        folder: where the files are.
        ffns: one per layer.
        norm_weights: of the norm before each FFN, where the predictors were trained on what is before it; None where
            they read the input of the FFN.
        relu: whether there is a ReLU between the matrices (PowerInfer, ProSparse), or nothing (Deja Vu).

    Raises:
        ArtifactError: a file is missing or damaged, or holds something else.
        UsageError: a predictor of another shape than its FFN, or other numbers of norms and FFNs.
    """
    if norm_weights is not None and len(norm_weights) != len(ffns):
        raise UsageError(f"{len(norm_weights)} norms were given for {len(ffns)} FFNs; give one for each.")
    found: list[LowRank] = []
    for layer, ffn in enumerate(ffns):
        path = folder / f"model_{layer}.pt"
        state = _read(path)
        first, second = state["fc1.weight"], state["fc2.weight"]
        if first.shape[1] != ffn.d_model or second.shape != (ffn.d_ff, first.shape[0]):
            raise UsageError(
                f"{path} has fc1 {tuple(first.shape)} and fc2 {tuple(second.shape)}; {ffn.name} needs [rank, "
                f"{ffn.d_model}] and [{ffn.d_ff}, rank]."
            )
        if norm_weights is not None:
            weight = norm_weights[layer].detach().cpu().double()
            state["fc1.weight"] = (first.double() / weight).to(first.dtype)
        one = LowRank(ffn, first.shape[0], relu=relu, bias="fc2.bias" in state).to(first.dtype)
        one.load_state_dict(state)
        found.append(one.eval().requires_grad_(False))
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; a predictor is needed for every FFN.") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): damaged, or another kind of file.") from error
    wanted = {"fc1.weight", "fc2.weight"}
    if not isinstance(value, Mapping) or not wanted <= set(value) <= wanted | {"fc2.bias"}:
        names = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ArtifactError(f"{path} holds {names}; expected fc1.weight and fc2.weight, and perhaps fc2.bias.")
    return dict(value)
