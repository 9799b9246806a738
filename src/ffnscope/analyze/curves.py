"""Loss curves: one FFN after the other is cut to several widths, and what the model loses is measured."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.ablation import is_skipped_exactly
from ffnscope.analyze.suffix import Prefix, prefix_of
from ffnscope.apply.one_shot import reconstruct
from ffnscope.apply.reconstruction import Reconstruction, reconstructed
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.fidelity import fidelity
from ffnscope.evaluate.forward import batch_logits, check_finite, evaluating, memory_errors
from ffnscope.evaluate.perplexity import check_targets
from ffnscope.evaluate.progress import Progress, open_progress, plan_key
from ffnscope.io import hash_json, hash_tensors
from ffnscope.plan.curves import Curves
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

OnCut = Callable[[int, int], None]
SPAN = 0.2
"""Around a solution: widths that are this share of d_ff wider and narrower."""
SAVED_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """What is measured, and how.

    Attributes:
        shares: kept shares of the channels, in (0, 1); not used around a solution.
        batch_size: windows per forward. The blocks before an FFN run once per batch for all of its widths.
        checkpoint: file of what is measured so far, from which an interrupted call goes on; the caller deletes it.
    """

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    batch_size: int = 8
    checkpoint: Path | None = None

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
        options: widths, batches and checkpoint.
        on_cut: called with (cuts measured, cuts in all).

    Raises:
        UsageError: no target, or an FFN that is not in ``around``.
        NonFiniteError: a KL is NaN or infinite.
        DeviceError: out of memory.
        ArtifactError: the checkpoint is damaged, or cannot be written.
    """
    options = options or CurveOptions()
    missing = [s.name for s in scores.values if around is not None and s not in around.plan.kept]
    if missing:
        raise UsageError(f"the solution to measure around has no {missing[0]}; use one for the same FFNs.")
    check_targets(windows)
    widths = {site: _widths(site, options.shares, around) for site in scores.values}
    cuts = _Cuts(model, scores, stats, widths)
    keys = _keys(scores, stats, widths, around)
    progress = open_progress(options.checkpoint, model, windows)
    with evaluating(model):
        batches = _Batches(model, windows, options.batch_size, around, list(scores.values))
        steps = _steps(batches, cuts, keys, progress)
        n_cuts = sum(map(len, widths.values())) * -(-len(windows) // options.batch_size)
        for done in accumulate(steps):
            if on_cut is not None:
                on_cut(done, n_cuts)
    points: dict[FFNSite, tuple[Tensor, Tensor]] = {}
    for site, names in keys.items():
        sums = torch.stack([progress.total(name, "rise").sum() for name in names])
        points[site] = torch.tensor(widths[site]), sums / windows.n_targets
    facts = {**_facts(scores, stats, windows, around), "model": weights_hash(model)}
    return Curves(points, "KL to the dense model, nats per token", facts)


def _steps(batches: _Batches, cuts: _Cuts, keys: Mapping[FFNSite, Sequence[str]], progress: Progress) -> Iterator[int]:
    """Measure what is missing in the progress, FFN by FFN of every batch; yield how many cuts are done by each."""
    saved = time.monotonic()
    for start in range(0, len(batches.windows), batches.size):
        part, run = slice(start, min(start + batches.size, len(batches.windows))), None
        for site, names in keys.items():
            if not all(progress.has(name, part) for name in names):
                with memory_errors(part.stop - part.start, batches.windows.length):
                    run = run or batches.run(start)
                    for name, rise in zip(names, run.measure(site, cuts.of(site)), strict=True):
                        progress.put(name, part, {"rise": rise})
                if time.monotonic() - saved > SAVED_SECONDS:
                    progress.save()
                    saved = time.monotonic()
            yield len(names)
        progress.save()


def _facts(
    scores: Scores, stats: Mapping[FFNSite, ChannelStats] | None, windows: Windows, around: Reconstruction | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"metric": scores.metric, "source": windows.source, "text": windows.hash}
    found |= {"tokens": windows.n_targets, "refitted": stats is not None}
    return found if around is None else {**found, "around": around.plan.sparsity}


def _keys(
    scores: Scores,
    stats: Mapping[FFNSite, ChannelStats] | None,
    widths: Mapping[FFNSite, Sequence[int]],
    around: Reconstruction | None,
) -> dict[FFNSite, list[str]]:
    """Name of every cut in a checkpoint; what is measured for other scores, tokens or solutions has other names."""
    order = hash_tensors((site.name, value) for site, value in scores.values.items())
    tokens = None if stats is None else [dict(stats[site].counts) for site in scores.values if site in stats]
    known = hash_json([order, tokens, None if around is None else plan_key(around)])
    return {site: [f"{known}/{site.name}/{width}" for width in chosen] for site, chosen in widths.items()}


def _prefixes(model: nn.Module, sites: Sequence[FFNSite], windows: Windows) -> dict[FFNSite, Prefix]:
    """The blocks before each FFN, where they can be skipped; FFNs of one block, such as experts, share one."""
    tried: dict[tuple[int, ...], Prefix] = {}
    found: dict[FFNSite, Prefix] = {}
    for site in sites:
        prefix = prefix_of(model, [site])
        blocks = tuple(map(id, prefix.blocks))
        if blocks not in tried:
            tried[blocks] = prefix if is_skipped_exactly(model, prefix, [site], windows) else Prefix([])
        found[site] = tried[blocks]
    return found


def _widths(site: FFNSite, shares: Sequence[float], around: Reconstruction | None) -> list[int]:
    """Widths to measure, rising, in [1, d_ff)."""
    if around is None:
        wished = [share * site.d_ff for share in shares]
    else:
        middle = around.plan.kept[site].numel()
        wished = [middle - SPAN * site.d_ff, middle, middle + SPAN * site.d_ff]
    return sorted({min(max(1, round(w)), site.d_ff - 1) for w in wished})


class _Cuts:
    """The model with one FFN cut to each of its widths; columns are made when they are first needed."""

    def __init__(
        self,
        model: nn.Module,
        scores: Scores,
        stats: Mapping[FFNSite, ChannelStats] | None,
        widths: Mapping[FFNSite, Sequence[int]],
    ):
        self.model = model
        self.scores = scores
        self.stats = stats
        self.widths = widths
        self.made: dict[FFNSite, list[Reconstruction]] = {}

    def of(self, site: FFNSite) -> list[Reconstruction]:
        """Cuts of a site."""
        if site not in self.made:
            self.made[site] = [self._cut(site, width) for width in self.widths[site]]
        return self.made[site]

    def _cut(self, site: FFNSite, width: int) -> Reconstruction:
        order = torch.sort(self.scores.values[site], descending=True, stable=True).indices
        kept = {site: order[:width].sort().values}
        plan = PruningPlan(kept, self.scores.metric, "single", Budget(1 - width / site.d_ff))
        return first_solution(self.model, plan, self.stats)


def first_solution(model: nn.Module, plan: PruningPlan, stats: Mapping[FFNSite, ChannelStats] | None) -> Reconstruction:
    """What to measure around, made of a plan: refitted in one shot with statistics, and as it is without.

    The damping is 0.01, so that each of many cuts is solved once. Too little text is not warned of here.
    """
    if stats is None:
        return Reconstruction(plan, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[^.]* were calibrated on fewer than")
        return reconstruct(model, plan, stats)


@dataclass(eq=False)
class _Batches:
    """The text in batches, and the model with the solution that is measured around."""

    model: nn.Module
    windows: Windows
    size: int
    around: Reconstruction | None
    sites: Sequence[FFNSite]

    @cached_property
    def prefixes(self) -> dict[FFNSite, Prefix]:
        """Tried when the first batch is needed."""
        return _prefixes(self.model, self.sites, self.windows)

    def run(self, start: int) -> _Run:
        """Run the batch that begins with this window, dense and around."""
        batch = next(self.windows[slice(start, start + self.size)].batches(self.size))  # padding is trimmed
        return _Run(self, batch, start)


class _Run:
    """One batch: what the dense model predicts, and what each FFN's block is given."""

    def __init__(self, of: _Batches, batch: Windows, start: int):
        self.model = of.model
        self.batch = batch
        self.start = start
        self.around = of.around
        self.prefixes = of.prefixes
        self.dense = batch_logits(self.model, batch)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_applied(self.model, self.around))
            for prefix in {id(prefix): prefix for prefix in self.prefixes.values()}.values():
                stack.enter_context(prefix.recording())
            batch_logits(self.model, batch)

    def measure(self, site: FFNSite, cuts: Sequence[Reconstruction]) -> list[Tensor]:
        """Rise of the KL summed over each window, [b] float64 for each cut of an FFN."""
        prefix = self.prefixes[site]
        with _applied(self.model, None if self.around is None else _without(self.around, site)):
            whole = 0.0 if self.around is None else self._divergence(prefix)
            rises: list[Tensor] = []
            for cut in cuts:
                with reconstructed(self.model, cut):
                    rises.append(self._divergence(prefix) - whole)
        return rises

    def _divergence(self, prefix: Prefix) -> Tensor:
        with prefix.skipping(1):
            logits = batch_logits(self.model, self.batch)
        found = fidelity(self.dense, logits, self.batch.targets)[0]
        check_finite(found, self.model, self.batch, self.start)
        return found


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
