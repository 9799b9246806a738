"""Loss curves: one FFN after the other is cut to several widths, and what the model loses is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.ablation import is_skipped_exactly
from ffnscope.analyze.suffix import Prefix, prefix_of
from ffnscope.apply.one_shot import reconstruct
from ffnscope.apply.reconstruction import Reconstruction, reconstructed
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.fidelity import fidelity
from ffnscope.evaluate.forward import batch_logits, evaluating, memory_errors
from ffnscope.evaluate.perplexity import check_targets
from ffnscope.plan.curves import Curves
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

OnCut = Callable[[int, int], None]
SPAN = 0.2
"""Around a solution: widths that are this share of d_ff wider and narrower."""


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """What is measured, and how.

    Attributes:
        shares: kept shares of the channels, in (0, 1); not used around a solution.
        batch_size: windows per forward. The blocks before an FFN run once per batch for all of its widths.
    """

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UsageError(f"shares must be kept shares in (0, 1); got {list(self.shares)}.")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; got {self.batch_size}.")


def measure_curves(
    model: nn.Module,
    scores: Scores,
    stats: Mapping[FFNSite, ChannelStats] | None,
    windows: Windows,
    *,
    around: Reconstruction | None = None,
    options: CurveOptions | None = None,
    on_cut: OnCut | None = None,
) -> Curves:
    """Measure the rise of the KL to the dense model when a single FFN is cut, for each FFN at several widths.

    What a cut costs depends on what else is cut: with ``around`` (a first solution) all other FFNs are as they are
    there, and the widths are those of the solution and 20 % of d_ff above and below it. Blocks before the FFN are not
    run again, so a curve costs half a forward per width on average. Replacing one layer and measuring the loss is how
    Puzzle (arXiv:2411.19146) builds its library; there, all widths are trained.

    Memory beside the model: logits of a batch twice, hidden states of a batch for every block, and the new columns of
    every measured width.

    Args:
        model: dense; left as it was.
        scores: the order of removal in each FFN.
        stats: with ``h_outer``: the columns that stay are refitted; None leaves them.
        windows: text; other than what the final result is judged on.
        around: measure around this solution, which must have all FFNs of the scores.
        options: widths and batches.
        on_cut: called with (cuts measured, cuts in all).

    Raises:
        UsageError: no target, or an FFN that is not in ``around``.
        NonFiniteError: a KL is NaN or infinite.
        DeviceError: out of memory.
    """
    options = options or CurveOptions()
    missing = [s.name for s in scores.values if around is not None and s not in around.plan.kept]
    if missing:
        raise UsageError(f"the solution to measure around has no {missing[0]}; use one for the same FFNs.")
    check_targets(windows)
    widths = {site: _widths(site, options.shares, around) for site in scores.values}
    cuts = {site: [_cut(model, scores, stats, site, w) for w in chosen] for site, chosen in widths.items()}
    total = {site: torch.zeros(len(chosen), dtype=torch.float64) for site, chosen in widths.items()}
    n_cuts, done = sum(map(len, widths.values())) * -(-len(windows) // options.batch_size), 0
    with evaluating(model):
        prefixes = {site: _prefix(model, site, windows) for site in scores.values}
        for batch in windows.batches(options.batch_size):
            run = _Run(model, batch, around, prefixes)
            for site in scores.values:
                with memory_errors(len(batch), batch.length):
                    total[site] += run.measure(site, cuts[site])
                done += len(cuts[site])
                if on_cut is not None:
                    on_cut(done, n_cuts)
    facts = {"metric": scores.metric, "text": windows.hash, "tokens": windows.n_targets, "refitted": stats is not None}
    points = {site: (torch.tensor(widths[site]), total[site] / windows.n_targets) for site in widths}
    return Curves(points, "KL to the dense model, nats per token", facts)


def _prefix(model: nn.Module, site: FFNSite, windows: Windows) -> Prefix:
    """The blocks before an FFN, where they can be skipped."""
    prefix = prefix_of(model, [site])
    return prefix if is_skipped_exactly(model, prefix, [site], windows) else Prefix([])


def _widths(site: FFNSite, shares: Sequence[float], around: Reconstruction | None) -> list[int]:
    """Widths to measure, rising, in [1, d_ff)."""
    if around is None:
        wished = [share * site.d_ff for share in shares]
    else:
        middle = around.plan.kept[site].numel()
        wished = [middle - SPAN * site.d_ff, middle, middle + SPAN * site.d_ff]
    return sorted({min(max(1, round(w)), site.d_ff - 1) for w in wished})


def _cut(
    model: nn.Module, scores: Scores, stats: Mapping[FFNSite, ChannelStats] | None, site: FFNSite, width: int
) -> Reconstruction:
    """The model with one FFN cut to a width."""
    order = torch.sort(scores.values[site], descending=True, stable=True).indices
    budget = Budget(1 - width / site.d_ff)
    plan = PruningPlan({site: order[:width].sort().values}, scores.metric, "single", budget)
    return Reconstruction(plan, {}) if stats is None else reconstruct(model, plan, stats)


class _Run:
    """One batch: what the dense model predicts, and what each FFN's block is given."""

    def __init__(
        self, model: nn.Module, batch: Windows, around: Reconstruction | None, prefixes: Mapping[FFNSite, Prefix]
    ):
        self.model = model
        self.batch = batch
        self.around = around
        self.dense = batch_logits(model, batch)
        self.prefixes = prefixes
        with contextlib.ExitStack() as stack:
            stack.enter_context(_applied(model, around))
            for prefix in self.prefixes.values():
                stack.enter_context(prefix.recording())
            batch_logits(model, batch)

    def measure(self, site: FFNSite, cuts: Sequence[Reconstruction]) -> Tensor:
        """Rise of the summed KL for each cut of an FFN, [n] float64."""
        prefix = self.prefixes[site]
        with _applied(self.model, None if self.around is None else _without(self.around, site)):
            whole = 0.0 if self.around is None else self._divergence(prefix)
            rises: list[float] = []
            for cut in cuts:
                with reconstructed(self.model, cut):
                    rises.append(self._divergence(prefix) - whole)
        return torch.tensor(rises, dtype=torch.float64)

    def _divergence(self, prefix: Prefix) -> float:
        with prefix.skipping(1):
            logits = batch_logits(self.model, self.batch)
        return float(fidelity(self.dense, logits, self.batch.targets)[0].sum())


@contextlib.contextmanager
def _applied(model: nn.Module, reconstruction: Reconstruction | None) -> Generator[None]:
    if reconstruction is None:
        yield
        return
    with reconstructed(model, reconstruction):
        yield


def _without(reconstruction: Reconstruction, site: FFNSite) -> Reconstruction:
    """The same, with one FFN left whole."""

    def others(values: Mapping[FFNSite, Any]) -> dict[FFNSite, Any]:
        return {s: v for s, v in values.items() if s != site}

    plan = replace(
        reconstruction.plan, kept=others(reconstruction.plan.kept), protected=others(reconstruction.plan.protected)
    )
    return replace(reconstruction, plan=plan, down=others(reconstruction.down), bias=others(reconstruction.bias))
