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

from ffnscope.apply.folder import replacing_folder
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.registry import predictor
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.sparse.predictors.low_rank import LowRank


def write_fc_predictors(
    folder: Path, predictors: Sequence[LowRank], norm_weights: Sequence[Tensor] | None = None
) -> None:
    """Write a file per layer, in their order. The folder appears with all of them, or not at all.

    Args:
        folder: a new or empty folder.
        predictors: one for each layer of the model, with a ReLU between their matrices.
        norm_weights: of the norm before each FFN [d_model], to write predictors that read what is before it; None
            writes them as they are, for a program that gives them the input of the FFN.

    Raises:
        UsageError: a predictor without ReLU, one that looks ahead, or other numbers of norms and predictors.
        ArtifactError: the folder holds something, is the current one, or cannot be written.
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
    check_new(folder)
    with replacing_folder(folder.resolve(), overwrite=folder.exists()) as made:  # what may be there is empty
        for layer, one in enumerate(predictors):
            state = {name: value.detach().cpu().clone() for name, value in one.state_dict().items()}
            if norm_weights is not None:
                weight = norm_weights[layer].detach().cpu()
                state["fc1.weight"] = (state["fc1.weight"].double() * weight.double()).to(state["fc1.weight"].dtype)
            torch.save(state, file_of(made, layer))


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
    norms = norm_weights or [None] * len(ffns)
    pairs = zip(ffns, norms, strict=True)
    return [_predictor(file_of(folder, layer), ffn, norm, relu=relu) for layer, (ffn, norm) in enumerate(pairs)]


@predictor("fc_files", source="PowerInfer (arXiv:2312.12456), ProSparse (arXiv:2402.13516)")
def fc_files(
    ffn: FFN,
    fit: FitTokens | None,
    *,
    folder: str,
    relu: bool = True,
    before_norm: bool = True,
    layer: int | None = None,
    norm: Tensor | None = None,
) -> Predictor:
    """Trained predictors of PowerInfer and ProSparse, from their files ``model_<layer>.pt``.

    Args:
        ffn: the FFN.
        fit: not used.
        folder: where the files are.
        relu: a ReLU between the matrices (PowerInfer, ProSparse), or nothing (Deja Vu).
        before_norm: whether they read what is before the norm of the FFN, as theirs do; false: the input of the FFN.
        layer: of the FFN; a card finds it.
        norm: weights of the norm before the FFN [d_model], for ``before_norm``; a card finds them.

    Raises:
        UsageError: no layer, no norm where it is needed, or a predictor of another shape than its FFN.
        ArtifactError: the file is missing or damaged, or holds something else.
    """
    if layer is None or (before_norm and norm is None):
        raise UsageError("fc_files needs the layer of the FFN, and the norm before it unless before_norm is false.")
    return _predictor(file_of(Path(folder), layer), ffn, norm if before_norm else None, relu=relu)


def check_new(folder: Path) -> None:
    """Raise ArtifactError unless a folder is new or empty, and not the current one, which cannot be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; predictors are written to a folder.")
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} is not empty. Choose another folder.")
    if folder.resolve() == Path.cwd():
        raise ArtifactError(
            f"{folder} is the current folder, and a finished one takes its place. Choose another folder."
        )


def file_of(folder: Path, layer: int) -> Path:
    """The file of a layer."""
    return folder / f"model_{layer}.pt"


def _predictor(path: Path, ffn: FFN, norm: Tensor | None, *, relu: bool) -> LowRank:
    state = _read(path)
    first, second = state["fc1.weight"], state["fc2.weight"]
    fits = first.dim() == second.dim() == 2 and first.shape[1] == ffn.d_model
    if not fits or second.shape != (ffn.d_ff, first.shape[0]):
        raise UsageError(
            f"{path} has fc1 {tuple(first.shape)} and fc2 {tuple(second.shape)}; {ffn.name} needs [rank, "
            f"{ffn.d_model}] and [{ffn.d_ff}, rank]."
        )
    if norm is not None:
        weight = norm.detach().cpu().double()
        if not bool((weight != 0).all()):
            raise UsageError(f"the norm before {ffn.name} has weights of 0, so what is before it cannot be told.")
        state["fc1.weight"] = (first.double() / weight).to(first.dtype)
    for name, value in state.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ArtifactError(f"{name} of {path} holds NaN, infinity or no floating numbers; export it again.")
    one = LowRank(ffn, first.shape[0], relu=relu, bias="fc2.bias" in state).to(first.dtype)
    one.load_state_dict(state)
    return one.to(ffn.weights.up.device).eval().requires_grad_(False)


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
