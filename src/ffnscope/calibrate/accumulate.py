"""Running sums of statistics over batches, exact under any split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ffnscope.errors import LayoutError, UsageError
from ffnscope.registry import STATISTICS, Statistic
from ffnscope.types import ChannelStats, FFNSite


class TokenRows:
    """Picks the counted tokens of a batch from signals of its sites.

    ``valid`` [batch, T] is False for padding, which is never counted.
    """

    def __init__(self, valid: Tensor):
        self.valid = valid
        self._index: dict[tuple[torch.device, int], Tensor | None] = {}

    def take(self, site: FFNSite, signal: Tensor, every: int = 1) -> Tensor:
        """[batch, T, d_ff] -> [n, d_ff]: every k-th token of each window, counted from its start, without padding.

        A model that flattens tokens before its FFN (OPT) gives [batch * T, d_ff], which is taken as well.

        Raises:
            LayoutError: the signal does not hold one row per token of the batch.
        """
        flat = signal.reshape(-1, signal.shape[-1])
        if flat.shape[0] != self.valid.numel():
            raise LayoutError(
                f"{site.name} was given {flat.shape[0]} rows for a batch of {tuple(self.valid.shape)} = "
                f"{self.valid.numel()} tokens; the channels of an FFN that sees only some tokens are not available."
            )
        index = self._indices(signal.device, every)
        return flat if index is None else flat.index_select(0, index)

    def _indices(self, device: torch.device, every: int) -> Tensor | None:
        key = (device, every)
        if key not in self._index:
            chosen = self.valid.clone()
            chosen[:, torch.arange(chosen.shape[1]) % every != 0] = False
            index = chosen.flatten().nonzero().flatten()
            self._index[key] = None if index.numel() == chosen.numel() else index.to(device)
        return self._index[key]


class Accumulator:
    """Sums of the requested statistics for several sites.

    ``observe`` and ``observe_gradient`` are the callbacks of the taps; ``begin`` sets the masks of the coming batch.

    Raises:
        UsageError: a gradient statistic asks for every k-th token; its mean would have no fixed denominator.
    """

    def __init__(self, sites: Sequence[FFNSite], names: Iterable[str]):
        self.sites = tuple(sites)
        statistics = [STATISTICS.get(n) for n in names]
        self.forward = [s for s in statistics if not s.needs_gradient]
        self.backward = [s for s in statistics if s.needs_gradient]
        for statistic in self.backward:
            if statistic.every != 1:
                raise UsageError(
                    f"statistic {statistic.name!r} reads gradients of every {statistic.every}th token; gradient "
                    "statistics are divided by the predicted tokens, so they read all: register it with every=1."
                )
        self._sums: dict[tuple[FFNSite, str], Tensor] = {}
        self._counts: dict[tuple[FFNSite, str], int] = {}
        self._finite: dict[FFNSite, Tensor] = {}
        self._rows: TokenRows | None = None
        self._n_targets = 0

    def begin(self, valid: Tensor, n_targets: int) -> None:
        """Announce a batch: which tokens are not padding [batch, T], and how many are predicted."""
        self._rows = TokenRows(valid)
        self._n_targets = n_targets

    def observe(self, site: FFNSite, h: Tensor) -> None:
        """Take h [batch, T, d_ff] of one batch."""
        rows = {every: self._take(site, h, every) for every in dict.fromkeys(s.every for s in self.forward)}
        values = [
            self._add(site, statistic, (rows[statistic.every],), rows[statistic.every].shape[0])
            for statistic in self.forward
        ]
        if values and not any(v.is_floating_point() for v in values):  # counts cannot show NaN
            self._finite[site] = torch.stack([torch.isfinite(r).all() for r in rows.values()]).all()

    def observe_gradient(self, site: FFNSite, h: Tensor, g: Tensor) -> None:
        """Take h and g [batch, T, d_ff] of one batch."""
        signals = {"h": self._take(site, h), "g": self._take(site, g)}
        for statistic in self.backward:
            self._add(site, statistic, tuple(signals[r] for r in statistic.reads), self._n_targets)

    def first_not_finite(self) -> FFNSite | None:
        """Return the site where sums turned NaN or infinite, or None.

        Activations are looked through in the order of the sites, then gradients from the last site to the first: the
        ways that they flow.
        """
        sums = [v for v in self._sums.values() if v.is_floating_point()]
        if _all_true([torch.isfinite(v).all() for v in sums] + list(self._finite.values())):
            return None
        forward, backward = [s.name for s in self.forward], [s.name for s in self.backward]
        bad = [s for s in self.sites if not self._is_finite(s, forward)]
        return bad[0] if bad else next(s for s in reversed(self.sites) if not self._is_finite(s, backward))

    def result(self) -> dict[FFNSite, ChannelStats]:
        """Statistics of every site, copied to the CPU."""
        found: dict[FFNSite, ChannelStats] = {}
        for site in self.sites:
            names = [s for s in (*self.forward, *self.backward) if (site, s.name) in self._sums]
            found[site] = ChannelStats(
                site,
                # a clone: the sums go on changing, and those made in inference mode could not be used in autograd
                {s.name: self._sums[site, s.name].cpu().clone() for s in names},
                {s.name: self._counts[site, s.name] for s in names},
                {s.name: s.reduce for s in names},
            )
        return found

    def restore(self, stats: Iterable[ChannelStats]) -> None:
        """Continue from sums that were saved."""
        for part in stats:
            for name, value in part.values.items():
                self._sums[part.site, name] = value.clone()
                self._counts[part.site, name] = part.counts[name]

    def _take(self, site: FFNSite, signal: Tensor, every: int = 1) -> Tensor:
        assert self._rows is not None, "begin was not called"
        rows = self._rows.take(site, signal, every)
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def _add(self, site: FFNSite, statistic: Statistic, signals: tuple[Tensor, ...], count: int) -> Tensor:
        key = (site, statistic.name)
        value: Tensor = statistic.fn(*signals)
        if value.device.type == "mps":
            value = value.cpu()  # no float64 there
        wide = value.to(torch.float64 if value.is_floating_point() else torch.int64)
        if key not in self._sums:
            self._sums[key] = wide.clone() if wide is value else wide  # a statistic may return a view of its signal
            self._counts[key] = count
            return wide
        total = self._sums[key].to(wide.device)
        self._sums[key] = total.add_(wide) if statistic.reduce == "sum" else torch.maximum(total, wide)
        self._counts[key] += count
        return wide

    def _is_finite(self, site: FFNSite, names: Sequence[str]) -> bool:
        sums = [self._sums[site, n] for n in names if (site, n) in self._sums]
        seen = self._finite.get(site)
        return all(bool(torch.isfinite(v).all()) for v in sums) and (seen is None or bool(seen))


def _all_true(flags: Sequence[Tensor]) -> bool:
    """Whether all boolean scalars are True, with one transfer per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(group).all()) for group in by_device.values())
