"""The training of FFNs within a sequential reconstruction: what can be trained, and by which activation function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ffnscope.apply.block_fit import Columns
from ffnscope.apply.distill import Distillation, OnEpoch, distill
from ffnscope.apply.ffn_tokens import FFNTokens, widened
from ffnscope.apply.rows import ChannelRows
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.function import FFN, Activation
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.types import FFNSite, FFNWeights

FUNCTIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
"""Tried after the one that the config names."""
_PIECE = 32
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 2e-2


@dataclass(frozen=True, slots=True, eq=False)
class FFNDistiller:
    """Trains the FFNs of one model.

    Attributes:
        options: see `Distillation`.
        activations: of each FFN, as measured.
        error_weights: see `distill`; FFNs that are absent have the identity.
    """

    options: Distillation
    activations: Mapping[FFNSite, Activation]
    error_weights: Mapping[FFNSite, Tensor]

    def improved(
        self, site: FFNSite, dense: FFNWeights, columns: Columns, tokens: FFNTokens, on_epoch: OnEpoch
    ) -> Columns:
        """The columns with trained rows and biases, or as they are where training does not help.

        ``dense`` are the weights of the whole FFN. An FFN without a token stays as it is.
        """
        if not tokens.n_fit or tokens.n == tokens.n_fit:
            return columns
        activation = self.activations[site]
        tokens.aim(dense, activation)
        kept = columns.kept.to(dense.up.device)
        bias = None if dense.down_bias is None else torch.zeros_like(dense.down_bias)
        start = _narrowed(dense, kept, bias)
        found, facts = distill(
            tokens,
            start,
            activation,
            self.options,
            damping=columns.facts["damping"],
            error_weights=self.error_weights.get(site),
            on_epoch=on_epoch,
        )
        told = {**columns.facts, "distilled": facts}
        if found is None:
            return replace(columns, facts=told)
        rows = ChannelRows(found.up, found.gate, found.up_bias, found.gate_bias)
        told |= {"error": facts["error"] / told["power"], "held_out": True, "trained": True}
        return Columns(columns.kept, found.down, told, rows, found.down_bias)


def open_distiller(
    model: nn.Module,
    sites: Sequence[FFNSite],
    windows: Windows,
    options: Distillation | None,
    error_weights: Mapping[FFNSite, Tensor] | None,
) -> FFNDistiller | None:
    """Make ready to train the FFNs of a `frozen` model; None without options.

    Raises:
        UsageError: error weights of other shapes, or without options.
        NotAvailableError: see `check_distillable` and `measured_activations`.
    """
    if options is None:
        if error_weights is not None:
            raise UsageError("error_weights would do nothing without a distillation (SequentialOptions.distillation).")
        return None
    check_distillable(sites)
    for site, value in (error_weights or {}).items():
        if site not in sites:
            raise UsageError(f"error_weights are given for {site.name}, which is not in the plan.")
        if tuple(value.shape) != (site.d_model, site.d_model):
            raise UsageError(
                f"error_weights of {site.name}: expected [d_model, d_model] = {(site.d_model, site.d_model)}, got "
                f"{tuple(value.shape)}."
            )
    return FFNDistiller(options, measured_activations(model, sites, windows), error_weights or {})


def check_distillable(sites: Sequence[FFNSite]) -> None:
    """Raise NotAvailableError unless the channels of each of these FFNs are a function of its own weights alone."""
    for site in sites:
        if site.expert is not None:
            why = "it is an expert, which has tokens of its own"
        elif site.norm is not None:
            why = f"a norm ({site.norm}) stands before its down projection"
        elif site.adapters:
            why = f"adapters ({', '.join(site.adapters)}) add to its gate or up projection"
        elif site.twins:
            why = f"{1 + len(site.twins)} layers share its parameters"
        else:
            continue
        raise NotAvailableError(
            f"{site.name} cannot be distilled: {why}; block-wise distillation trains dense FFNs of one layer. "
            "Reconstruct without a distillation (no --distill), or leave it out of the plan."
        )


def measured_activations(model: nn.Module, sites: Sequence[FFNSite], windows: Windows) -> dict[FFNSite, Activation]:
    """The activation function of each FFN: the one that gives its channels on a piece of text.

    The one that the config names is tried first, then others that are usual. The model must be `frozen`.

    Raises:
        NotAvailableError: an FFN that computes its channels in another way.
    """
    seen: dict[FFNSite, tuple[Tensor, Tensor]] = {}
    inputs: dict[FFNSite, Tensor] = {}
    piece = windows[:1].cut(_PIECE)
    rows = TokenRows(piece.valid)

    def read(site: FFNSite, name: str, x: Tensor) -> None:
        inputs[site] = x.clone()

    def note(site: FFNSite, h: Tensor) -> None:
        seen[site] = rows.take(site, inputs[site]), rows.take(site, h.clone())

    with torch.no_grad():
        with channel_taps(model, sites, note, None, SignalTap(read, ("x",))):
            forward_logits(model, piece)
        return {site: _matching(model, site, *seen[site]) for site in sites}


def _matching(model: nn.Module, site: FFNSite, x: Tensor, h: Tensor) -> Activation:
    with materialised(model, site):
        weights = widened(weights_of(model, site))
        wide = x.to(weights.up)
        allowed = _ROUNDING.get(h.dtype, _COARSE) * float(h.abs().max())
        for name in dict.fromkeys((site.activation, *FUNCTIONS)):
            function = _named(name)
            if function is not None:
                found = FFN(weights, function).h(wide)
                if float((found - h.to(found)).abs().max()) <= allowed:
                    return function
    raise NotAvailableError(
        f"{site.name} cannot be distilled: its channels are not act(gate x) * (up x), or act(up x), with the function "
        f"that its config names ({site.activation}) or another usual one ({', '.join(FUNCTIONS)}). Reconstruct "
        "without a distillation (no --distill), or leave it out of the plan."
    )


def _named(name: str) -> Activation | None:
    from transformers.activations import ACT2FN

    return ACT2FN[name] if name in ACT2FN.keys() else None  # noqa: SIM118 - get() would not build it


def _narrowed(dense: FFNWeights, kept: Tensor, bias: Tensor | None) -> FFNWeights:
    """Weights of the kept channels; ``bias`` is what is added to that of down."""

    def rows(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[kept]

    up, down = dense.up[kept], dense.down[:, kept]
    return FFNWeights(rows(dense.gate), up, down, rows(dense.gate_bias), rows(dense.up_bias), bias)
