"""Quality against cost: perplexity of sparse and other cheap FFNs beside the dense model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.forward import evaluating
from ffnscope.evaluate.intervals import Estimate, over_documents
from ffnscope.evaluate.perplexity import check_targets, perplexity_result, token_nll
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.forms import Form, dense_bytes
from ffnscope.sparse.masking import Selected
from ffnscope.types import EvalResult, FFNSite

DENSE = "dense"
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Loss of one form on one text.

    Attributes:
        nll: sum of the NLL of each window's counted targets [n], nats.
        densities: site -> mean share of the channels that was selected for a token; empty for a form without masks.
    """

    nll: Tensor
    densities: Mapping[FFNSite, float]


@dataclass(frozen=True, slots=True)
class FormRow:
    """One line of a comparison of forms.

    Attributes:
        label: of the form, or "dense".
        perplexity: with its standard error over windows.
        difference: mean NLL less that of the dense model, nats per token, paired; None for the dense model.
        density: mean over tokens and FFNs, weighted by channels; None for a form without masks.
        densities: name of a site -> density.
        bytes_read: by the FFNs per token, of `ffnscope.sparse.costs.UNIT`, predictors included.
        dense_bytes: the same of the dense FFNs.
    """

    label: str
    perplexity: EvalResult
    difference: Estimate | None
    density: float | None
    densities: Mapping[str, float]
    bytes_read: float
    dense_bytes: float

    @property
    def bytes_share(self) -> float:
        """Bytes read as a share of those of the dense FFNs."""
        return self.bytes_read / self.dense_bytes

    def flat(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        found = asdict(self.difference) if self.difference else dict.fromkeys(("value", "low", "high", "documents"))
        return {
            "label": self.label,
            "dataset": self.perplexity.dataset,
            "perplexity": self.perplexity.value,
            **{f"loss_difference_{name}": value for name, value in found.items()},
            "density": self.density,
            "bytes_read": self.bytes_read,
            "bytes_share": self.bytes_share,
            "bytes_of": UNIT,
            "n_targets": self.perplexity.n,
        }


def form_row_of(flat: Mapping[str, Any]) -> FormRow:
    """A line from what `FormRow.flat` gave; without densities by site and the standard error of the perplexity."""
    ends = (flat[f"loss_difference_{name}"] for name in ("value", "low", "high", "documents"))
    return FormRow(
        flat["label"],
        EvalResult("perplexity", flat["perplexity"], "1", None, flat["n_targets"], flat["dataset"], ""),
        None if flat["loss_difference_value"] is None else Estimate(*ends),
        flat["density"],
        {},
        flat["bytes_read"],
        flat["bytes_read"] / flat["bytes_share"],
    )


def form_losses(
    model: nn.Module,
    form: Form | None,
    windows: Windows,
    *,
    prompt: int = 0,
    batch_size: int = 1,
    on_batch: OnBatch | None = None,
) -> Losses:
    """Losses of a model in which a form runs in the place of its FFNs.

    Args:
        model: a causal LM; left as it was.
        form: what runs; None for the dense model.
        windows: the text.
        prompt: tokens at the beginning of each window that run dense under masks and whose prediction does not count,
            as in decoding after a prompt. Losses are comparable at the same prompt only.
        batch_size: windows per forward.
        on_batch: called after each batch with (batches done, batches in all).

    Raises:
        UsageError: no target is left.
        NonFiniteError: a loss is NaN or infinite.
    """
    counted = after_prompt(windows, prompt)
    total, parts = math.ceil(len(windows) / max(batch_size, 1)), list[Tensor]()
    with evaluating(model), _applied(model, form, prompt) as selected:
        for done, batch in enumerate(counted.batches(batch_size), 1):
            if selected is not None:
                selected.begin(batch)
            parts.append(token_nll(model, batch, first=(done - 1) * batch_size)[0])
            if on_batch is not None:
                on_batch(done, total)
    return Losses(torch.cat(parts), {} if selected is None else selected.densities())


def after_prompt(windows: Windows, prompt: int) -> Windows:
    """The windows with only those targets that a token after the prompt predicts.

    Raises:
        UsageError: none is left.
    """
    targets = windows.targets.clone()
    if prompt:
        targets[:, : prompt + 1] = False
    found = Windows(windows.input_ids, windows.valid, targets, windows.document, windows.source)
    check_targets(found)
    return found


def form_row(
    model: nn.Module, form: Form | None, losses: Losses, dense: Losses, windows: Windows, prompt: int = 0
) -> FormRow:
    """A line from losses that were measured, of the form and of the dense model, with the same prompt."""
    counted = after_prompt(windows, prompt)
    whole = dense_bytes(model)
    replaced = 0.0 if form is None else dense_bytes(model, list(form.sites))
    difference = None
    if form is not None:
        difference = over_documents(losses.nll - dense.nll, windows.document, counted.targets.sum(1))
    return FormRow(
        DENSE if form is None else form.label,
        perplexity_result(losses.nll, counted),
        difference,
        mean_density(losses.densities),
        {site.name: value for site, value in losses.densities.items()},
        whole - replaced + (0.0 if form is None else form.bytes_read(losses.densities)),
        whole,
    )


def compare_forms(
    model: nn.Module,
    forms: Sequence[Form],
    windows: Windows,
    *,
    prompt: int = 0,
    batch_size: int = 1,
    on_batch: OnBatch | None = None,
) -> list[FormRow]:
    """Evaluate the dense model and every form on the same windows: a line each, dense first.

    Args: see `form_losses`; ``on_batch`` counts the batches of all forms.
    """
    each = math.ceil(len(windows) / max(batch_size, 1))
    found: list[Losses] = []
    for index, form in enumerate((None, *forms)):

        def step(done: int, _: int, before: int = index * each) -> None:
            if on_batch is not None:
                on_batch(before + done, each * (len(forms) + 1))

        found.append(form_losses(model, form, windows, prompt=prompt, batch_size=batch_size, on_batch=step))
    return [
        form_row(model, form, losses, found[0], windows, prompt)
        for form, losses in zip((None, *forms), found, strict=True)
    ]


def mean_density(densities: Mapping[FFNSite, float]) -> float | None:
    """Mean over FFNs, weighted by their channels; None for none."""
    channels = sum(site.d_ff for site in densities)
    return sum(value * site.d_ff for site, value in densities.items()) / channels if channels else None


def _applied(model: nn.Module, form: Form | None, prompt: int) -> contextlib.AbstractContextManager[Selected | None]:
    return contextlib.nullcontext() if form is None else form.applied(model, prompt)
