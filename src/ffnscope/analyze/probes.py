"""What sets of channels are worth: the loss without the core, its halo, matched controls, and parts of the core.

All of it changes the model for the length of a forward only (`masked`, `replaced`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnscope.apply.mask import masked
from ffnscope.apply.replace import replaced
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.forward import batch_logits, check_finite, evaluating, memory_errors
from ffnscope.evaluate.perplexity import check_targets, nll_sums, window_ratio
from ffnscope.evaluate.progress import DENSE, Progress, open_progress
from ffnscope.io import hash_tensors
from ffnscope.types import Budget, FFNSite, PruningPlan

How = Literal["zero", "mean"]
Sets = Mapping[FFNSite, Tensor]
BINS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Channels to remove together, and what they are.

    Attributes:
        name: what the set is, e.g. "core" or "lp_matched".
        channels: site -> channels [k] int64; sites without any are left out.
        how: "zero": they contribute nothing; "mean": each holds its mean over the calibration.
        draw: number of the draw, for sets that are drawn at random.
        facts: further columns of its row.
    """

    name: str
    channels: Sets
    how: How = "zero"
    draw: int = 0
    facts: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def n_channels(self) -> int:
        """Channels in all sites."""
        return sum(index.numel() for index in self.channels.values())


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """What removing a set did.

    Attributes:
        name: the set.
        how: how it was removed.
        draw: number of the draw.
        n_channels: channels removed.
        loss_change: change of the mean token NLL, nats/token; positive = the loss rises.
        stderr: its standard error over windows; None for a single one.
        perplexity: of the changed model.
        n_targets: predicted tokens.
        documents: documents that the windows start in.
        facts: further columns.
    """

    name: str
    how: How
    draw: int
    n_channels: int
    loss_change: float
    stderr: float | None
    perplexity: float
    n_targets: int
    documents: int
    facts: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        row = {name: getattr(self, name) for name in self.__slots__ if name not in ("name", "facts")}
        return {"set": self.name, "site": "all", "layer": None, **row, **self.facts}


def run_probes(
    model: nn.Module,
    probes: Sequence[Probe],
    windows: Windows,
    *,
    means: Mapping[FFNSite, Tensor] | None = None,
    batch_size: int = 1,
    state: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[ProbeRow]:
    """Measure the loss with each set removed, on the same windows as without.

    Args:
        model: the dense model; bit-identical afterwards, also after an exception or an interrupt.
        probes: the sets.
        windows: held-out text.
        means: site -> mean of h [d_ff], for probes that set channels to their mean.
        batch_size: windows per forward; sets memory, not results.
        state: file with what was measured, written after each batch; continued from if it belongs to the same text and
            model.
        on_batch: called with (forwards done, forwards in all).

    Raises:
        UsageError: no probe, an empty one, no means for one that needs them, or no target.
        NonFiniteError: a loss is NaN or infinite.
        ArtifactError: ``state`` is damaged or of another kind.
    """
    check_targets(windows)
    _check(probes, means)
    keys = [_key(probe, means) for probe in probes]
    progress = open_progress(state, model, windows)
    total, done = math.ceil(len(windows) / batch_size) * (1 + len(probes)), 0
    with evaluating(model):
        for index, batch in enumerate(windows.batches(batch_size)):
            part = slice(index * batch_size, index * batch_size + len(batch))
            for key, probe in [(DENSE, None), *zip(keys, probes, strict=True)]:
                done += 1
                if not progress.has(key, part):
                    _measure(model, probe, means, batch, part, progress, key)
                    if on_batch is not None:
                        on_batch(done, total)
            progress.save()
    return [_row(probe, key, progress, windows) for probe, key in zip(probes, keys, strict=True)]


def control_probes(
    core: Sets, halos: Mapping[str, Sets], scores: Mapping[FFNSite, Tensor], *, draws: int = 3, seed: int = 0
) -> list[Probe]:
    """The core, each halo, core and halo together, and controls of the halo's size outside both.

    Controls are drawn ``draws`` times: "random", and "lp_matched", which has as many channels of each of `BINS`
    quantile bins of the score as the (first) halo has.

    Args:
        core: site -> core channels.
        halos: name -> site -> channels of a halo.
        scores: site -> score [d_ff] to match by, as the loss proxy.
        draws: draws of each control.
        seed: of the draws.
    """
    probes = [Probe("core", core)]
    for name, halo in halos.items():
        probes += [Probe(name, halo), Probe(f"core_and_{name}", _joined(core, halo))]
    halo = next(iter(halos.values()), core)
    random = torch.Generator().manual_seed(seed)
    for draw in range(draws):
        drawn: dict[str, dict[FFNSite, Tensor]] = {"random": {}, "lp_matched": {}}
        for site, members in halo.items():
            free = _outside(site, core.get(site), *(h.get(site) for h in halos.values()))
            drawn["random"][site] = _some(free, members.numel(), random)
            drawn["lp_matched"][site] = _matched(members, free, scores[site].cpu(), random)
        probes += [Probe(name, channels, draw=draw) for name, channels in drawn.items()]
    return probes


def dose_probes(
    core: Sets,
    sites: Sequence[FFNSite],
    sparsity: float,
    *,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    draws: int = 3,
    seed: int = 0,
) -> list[Probe]:
    """Random masks of one size that hold a share of the core: does the loss follow the core, or the size?

    Args:
        core: site -> core channels.
        sites: FFNs that lose channels.
        sparsity: share of the channels of each that is removed, in (0, 1).
        shares: shares of the core among them, in [0, 1].
        draws: masks per share.
        seed: of the draws.

    Raises:
        UsageError: a number is out of range, or a mask cannot hold that much of the core, or that little.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"sparsity of the masks must be in (0, 1); got {sparsity:g}.")
    if any(not 0 <= share <= 1 for share in shares) or draws < 1:
        raise UsageError(f"shares of the core must be in [0, 1], and draws at least 1; got {list(shares)}, {draws}.")
    random = torch.Generator().manual_seed(seed)
    found: list[Probe] = []
    for site in sites:
        check_doses(site, core[site].numel(), sparsity, shares)
    for share in shares:
        for draw in range(draws):
            channels = {site: _dose(site, core[site], sparsity, share, random) for site in sites}
            found.append(Probe("dose", channels, draw=draw, facts={"core_share": share, "sparsity": sparsity}))
    return found


def check_doses(site: FFNSite, n_core: int, sparsity: float, shares: Sequence[float]) -> None:
    """Raise UsageError where a mask of a site cannot hold one of the shares of a core of ``n_core`` channels."""
    size, others = round(sparsity * site.d_ff), site.d_ff - n_core
    for inside in (round(share * n_core) for share in shares):
        if not inside <= size <= inside + others:
            raise UsageError(
                f"{site.name}: a mask of {size} channels cannot hold {inside} of {n_core} core channels, with "
                f"{others} others. Choose another sparsity, or a smaller core."
            )


def _dose(site: FFNSite, core: Tensor, sparsity: float, share: float, random: torch.Generator) -> Tensor:
    size, inside = round(sparsity * site.d_ff), round(share * core.numel())
    outside = _outside(site, core)
    return torch.cat([_some(core.cpu(), inside, random), _some(outside, size - inside, random)]).sort().values


def _check(probes: Sequence[Probe], means: Mapping[FFNSite, Tensor] | None) -> None:
    if not probes:
        raise UsageError("there is no set of channels to remove: give at least one probe.")
    for probe in probes:
        if not probe.n_channels:
            raise UsageError(f"probe {probe.name!r} has no channel.")
        if probe.how == "mean" and (means is None or any(site not in means for site in probe.channels)):
            raise UsageError(f"probe {probe.name!r} sets channels to their mean, and no means of them are given.")


def _measure(
    model: nn.Module,
    probe: Probe | None,
    means: Mapping[FFNSite, Tensor] | None,
    batch: Windows,
    part: slice,
    progress: Progress,
    key: str,
) -> None:
    with memory_errors(len(batch), batch.length), _without(model, probe, means):
        sums = nll_sums(batch_logits(model, batch), batch)
    check_finite(sums, model, batch, part.start)
    progress.put(key, part, {"nll": sums})


def _without(model: nn.Module, probe: Probe | None, means: Mapping[FFNSite, Tensor] | None) -> Any:
    if probe is None:
        return replaced(model, {})
    if probe.how == "mean":
        assert means is not None
        return replaced(model, {site: (index, means[site][index]) for site, index in probe.channels.items()})
    kept = {site: _outside(site, index) for site, index in probe.channels.items()}
    removed = probe.n_channels / sum(site.d_ff for site in kept)
    return masked(model, PruningPlan(kept, probe.name, "probe", Budget(min(removed, 1 - 1e-9))))


def _row(probe: Probe, key: str, progress: Progress, windows: Windows) -> ProbeRow:
    counts = windows.targets.sum(1)
    changed, dense = progress.total(key, "nll"), progress.total(DENSE, "nll")
    change, stderr = window_ratio(changed - dense, counts)
    mean, _ = window_ratio(changed, counts)
    return ProbeRow(
        probe.name,
        probe.how,
        probe.draw,
        probe.n_channels,
        change,
        stderr,
        math.exp(mean),
        windows.n_targets,
        int(windows.document.unique().numel()),
        probe.facts,
    )


def _key(probe: Probe, means: Mapping[FFNSite, Tensor] | None) -> str:
    parts = [(site.name, index) for site, index in probe.channels.items()]
    if probe.how == "mean" and means is not None:
        parts += [(f"{site.name}/mean", means[site][index]) for site, index in probe.channels.items()]
    return f"{probe.how}-{hash_tensors(parts)}"


def _outside(site: FFNSite, *sets: Tensor | None) -> Tensor:
    """Channels of a site that are in none of the sets, sorted."""
    keep = torch.ones(site.d_ff, dtype=torch.bool)
    for index in sets:
        if index is not None:
            keep[index.cpu()] = False
    return keep.nonzero().flatten()


def _joined(first: Sets, second: Sets) -> dict[FFNSite, Tensor]:
    sites = [*dict.fromkeys([*first, *second])]
    return {s: torch.cat([part[s].cpu() for part in (first, second) if s in part]).unique() for s in sites}


def _some(channels: Tensor, n: int, random: torch.Generator) -> Tensor:
    """``n`` of the channels (all if there are fewer), sorted."""
    return channels[torch.randperm(channels.numel(), generator=random)[:n]].sort().values


def _matched(members: Tensor, free: Tensor, scores: Tensor, random: torch.Generator) -> Tensor:
    """As many free channels of each quantile bin of the score as the members have there, nearest bins first."""
    edges = scores.double().quantile(torch.linspace(0, 1, BINS + 1, dtype=torch.float64))[1:-1]
    of = torch.bucketize(scores.double(), edges)
    picked: list[Tensor] = []
    for wanted, n in _counts(of[members.cpu()]):
        picked.append(_nearest(free, of, wanted, n, random))
        free = free[~torch.isin(free, picked[-1])]
    return torch.cat(picked).sort().values


def _counts(bins: Tensor) -> Iterator[tuple[int, int]]:
    values, counts = bins.unique(return_counts=True)
    yield from zip(values.tolist(), counts.tolist(), strict=True)


def _nearest(free: Tensor, of: Tensor, wanted: int, n: int, random: torch.Generator) -> Tensor:
    order = torch.randperm(free.numel(), generator=random)
    distance = (of[free[order]] - wanted).abs()
    return free[order[torch.sort(distance, stable=True).indices[:n]]]
