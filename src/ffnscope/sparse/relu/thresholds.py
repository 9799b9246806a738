"""Thresholds of FATReLU, one per FFN: their calibration to a perplexity bound, their file, and what they select."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn.function import FFN, wide
from ffnscope.io import SCHEMA, complete, expect_kind, read_state, write_state
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.products import Products
from ffnscope.sparse.relu.activation import check_threshold, set_thresholds_
from ffnscope.sparse.streaming import trace_rounds
from ffnscope.types import FFNSite

KIND = "activation thresholds"
THRESHOLDS = "thresholds.json"
"""Their file beside the weights of a checkpoint."""
POINTS, TOKENS, TRIALS = 16, 512, 10
LARGEST_QUANTILE = 0.9
OnTrial = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class ErrorCurve:
    """What thresholds cost one FFN: thresholds [n] rising from 0, and the relative error of the output at each [n]."""

    thresholds: Tensor
    errors: Tensor

    def largest(self, error: float) -> float:
        """Largest measured threshold whose error, and that of every smaller one, is at most ``error``."""
        return float(self.thresholds[int((self.errors <= error).sum()) - 1])


@dataclass(frozen=True, slots=True)
class Shift:
    """What `calibrate_thresholds` found.

    Attributes:
        thresholds: site -> threshold, 0 where nothing is shifted.
        error: the level of the relative error that all FFNs share.
        before: perplexity on the calibration windows without a shift.
        after: perplexity there with it.
    """

    thresholds: Mapping[FFNSite, float]
    error: float
    before: float
    after: float


def calibrate_thresholds(
    model: nn.Module,
    windows: Windows,
    sites: Sequence[FFNSite],
    *,
    rise: float,
    batch_size: int = 4,
    on_trial: OnTrial | None = None,
) -> Shift:
    """Find a threshold per FFN of a ReLU model, as large as a bound on the perplexity allows.

    ProSparse (arXiv:2402.13516) gives all layers the same threshold. Here all FFNs share a level of the relative error
    of their output (CETT of ReLU² Wins, arXiv:2402.03804), at most so much is lost by what is newly zero, and the level
    is halved in its logarithm until the perplexity is at the bound (Sparsing Law, arXiv:2411.02335). Of the thresholds
    that were tried, the result has the largest level that keeps the bound on these windows; on others it may be
    exceeded, so measure it there.

    Args:
        model: whose FFNs have `relu` or `relu2`; thresholds that it has already are lost. Left without any.
        windows: text to calibrate on, not that of the evaluation.
        sites: the FFNs.
        rise: bound of the relative rise of the perplexity, for example 0.005.
        batch_size: windows per forward.
        on_trial: called with (forward passes over the windows done, in all).

    Raises:
        UsageError: the bound is negative or not finite, or the windows have no targets.
        NotAvailableError: an FFN has another activation.
    """
    if not 0 <= rise < float("inf"):
        raise UsageError(f"the allowed rise of the perplexity must be 0 or more, such as 0.005; got {rise:g}.")
    report = on_trial or (lambda done, total: None)
    set_thresholds_(model, dict.fromkeys(sites, 0.0))
    curves = error_curves(model, windows, sites, batch_size=batch_size)
    report(1, TRIALS + 2)
    before = perplexity(model, windows, batch_size=batch_size).value
    report(2, TRIALS + 2)
    best, found = 0.0, before
    levels = torch.cat([curve.errors for curve in curves.values()])
    low, high = float(levels[levels > 0].min().log()), float(levels.max().log())
    try:
        for trial in range(TRIALS):
            error = float(torch.tensor((low + high) / 2 if trial else high).exp())
            set_thresholds_(model, {site: curve.largest(error) for site, curve in curves.items()})
            value = perplexity(model, windows, batch_size=batch_size).value
            if value <= before * (1 + rise):
                low, best, found = float(torch.tensor(error).log()), error, value
            else:
                high = float(torch.tensor(error).log())
            report(trial + 3, TRIALS + 2)
    finally:
        set_thresholds_(model, dict.fromkeys(sites, 0.0))
    return Shift({site: curve.largest(best) for site, curve in curves.items()}, best, before, found)


@torch.no_grad()
def error_curves(
    model: nn.Module, windows: Windows, sites: Sequence[FFNSite], *, batch_size: int = 4
) -> dict[FFNSite, ErrorCurve]:
    """Relative error of the output of every FFN at rising thresholds, on at most 512 of the windows' tokens.

    The error at T is ||W_down d|| / ||W_down h|| with the h that T makes zero in d, both summed in squares over tokens.
    It is made not to fall with T.
    """
    found: dict[FFNSite, ErrorCurve] = {}
    batches = list(windows[slice(0, max(1, TOKENS // windows.length))].batches(batch_size))
    for inputs in trace_rounds(model, sites, batches):
        for site, one in inputs.items():
            x = one.x[:: max(1, len(one.x) // TOKENS)]
            found[site] = _curve(ffn_of(model, site), x)
    return found


def _curve(ffn: FFN, x: Tensor) -> ErrorCurve:
    x = x.to(ffn.weights.up.device)
    read, h, down = ffn.activation_input(x), ffn.h(x), wide(ffn.weights.down)
    positive = read[read > 0]
    if not positive.numel():
        return ErrorCurve(torch.zeros(1), torch.zeros(1))
    ranks = torch.linspace(0, LARGEST_QUANTILE, POINTS + 1)[1:] * (positive.numel() - 1)
    thresholds = positive.sort().values[ranks.long().to(positive.device)].unique()
    whole = (h @ down.T).square().sum()
    lost = [((h * (read < t)) @ down.T).square().sum() / whole for t in thresholds]
    errors = torch.stack([whole.new_zeros(()), *lost]).sqrt().cummax(0).values
    return ErrorCurve(torch.cat([thresholds.new_zeros(1), thresholds]).cpu(), errors.cpu())


class NonZero:
    """A selector for `wrap_` that keeps exactly the channels that a ReLU, or a FATReLU, does not make zero.

    It reads the whole gate (or up, without a gate) and no predictor; the runtime takes from it what it has read. So at
    most two thirds of an FFN are saved, or half of one without a gate. What is NaN is kept, and seen. With it
    and ``prefill=True`` a model with plain ReLUs computes what one with FATReLU does. Kernels know plain ReLUs only:
    with thresholds in its modules (`set_thresholds_`) a model runs projection by projection, which is slower, and needs
    no ``prefill``.

    Args:
        model: with `relu` or `relu2`.
        site: the FFN.
        threshold: of its FATReLU; 0 for a plain ReLU.
    """

    def __init__(self, model: nn.Module, site: FFNSite, threshold: float = 0.0):
        self.ffn, self.threshold = ffn_of(model, site), check_threshold(threshold)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [T, d_model] -> mask [T, d_ff] of bool."""
        return self.select_and_read(x)[0]

    @torch.no_grad()
    def select_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """Inputs [T, d_model] -> mask [T, d_ff] of bool, and what the activation reads."""
        read = self.ffn.activation_input(x)
        known = Products(gate=read) if self.ffn.gated else Products(up=read)
        return ~((read <= 0) | (read < self.threshold)), known


def write_thresholds(path: Path, thresholds: Mapping[FFNSite, float], facts: Mapping[str, Any]) -> None:
    """Write thresholds as JSON, with facts beside them."""
    rows = [{"site": asdict(site), "name": site.name, "threshold": value} for site, value in thresholds.items()]
    write_state(path, {"kind": KIND, "schema": SCHEMA, **facts, "thresholds": rows})


def read_thresholds(path: Path) -> dict[FFNSite, float]:
    """Read what `write_thresholds` wrote, for `set_thresholds_`, which puts them into a model in memory.

    Raises:
        ArtifactError: missing, damaged, or of another kind.
    """
    value = read_state(path)
    expect_kind(path, value, KIND)
    with complete(path, KIND):
        return {FFNSite(**row["site"]): float(row["threshold"]) for row in value["thresholds"]}
