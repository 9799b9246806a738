"""Running sums of statistics over batches, exact under any split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError
from ffnscope.registry import STATISTICS, Statistic
from ffnscope.types import ChannelStats, FFNSite


class Accumulator:
    """Sums of the requested statistics for several sites.

    ``observe`` and ``observe_gradient`` are the callbacks of the taps; ``begin`` sets the masks of the coming batch.
    """

    def __init__(self, sites: Sequence[FFNSite], names: Iterable[str]):
        self.sites = tuple(sites)
        statistics = [STATISTICS.get(n) for n in names]
        self.forward = [s for s in statistics if not s.needs_gradient]
        self.backward = [s for s in statistics if s.needs_gradient]
        self._sums: dict[tuple[FFNSite, str], Tensor] = {}
        self._counts: dict[tuple[FFNSite, str], int] = {}
        self._valid: Tensor | None = None
        self._n_targets = 0

    def begin(self, valid: Tensor, n_targets: int) -> None:
        """Announce a batch: which tokens are not padding [batch, T], and how many are predicted."""
        self._valid = None if bool(valid.all()) else valid
        self._n_targets = n_targets

    def observe(self, site: FFNSite, h: Tensor) -> None:
        """Take h [batch, T, d_ff] of one batch."""
        strides = dict.fromkeys(s.every for s in self.forward)
        rows = {every: self._rows(h, every) for every in strides}
        for statistic in self.forward:
            self._add(site, statistic, (rows[statistic.every],), rows[statistic.every].shape[0])

    def observe_gradient(self, site: FFNSite, h: Tensor, g: Tensor) -> None:
        """Take h and g [batch, T, d_ff] of one batch."""
        signals = {"h": self._rows(h, 1), "g": self._rows(g, 1)}
        for statistic in self.backward:
            self._add(site, statistic, tuple(signals[r] for r in statistic.reads), self._n_targets)

    def check_finite(self) -> None:
        """Raise NonFiniteError that names the first site whose sums are NaN or infinite."""
        for site in self.sites:
            for statistic in (*self.forward, *self.backward):
                value = self._sums.get((site, statistic.name))
                if value is not None and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    what = "gradient" if statistic.needs_gradient else "activation"
                    raise NonFiniteError(
                        f"a channel {what} of {site.name} is NaN or infinite (statistic {statistic.name!r}). "
                        "In float16 this is usually an overflow: load the model in bfloat16 or float32 (model.dtype); "
                        "otherwise look for NaN in the checkpoint."
                    )

    def result(self) -> dict[FFNSite, ChannelStats]:
        """Statistics of every site, on the CPU."""
        found: dict[FFNSite, ChannelStats] = {}
        for site in self.sites:
            names = [s for s in (*self.forward, *self.backward) if (site, s.name) in self._sums]
            found[site] = ChannelStats(
                site,
                {s.name: self._sums[site, s.name].cpu() for s in names},
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

    def _rows(self, signal: Tensor, every: int) -> Tensor:
        """[batch, T, d_ff] -> [n, d_ff]: every k-th token of each window, without padding, in at least float32."""
        signal = signal[:, ::every]
        if self._valid is None:
            rows = signal.reshape(-1, signal.shape[-1])
        else:
            rows = signal[self._valid[:, ::every].to(signal.device)]
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def _add(self, site: FFNSite, statistic: Statistic, signals: tuple[Tensor, ...], count: int) -> None:
        key = (site, statistic.name)
        value: Tensor = statistic.fn(*signals)
        wide = value.to(torch.float64 if value.is_floating_point() else torch.int64)
        if key not in self._sums:
            self._sums[key], self._counts[key] = wide, count
            return
        total = self._sums[key].to(wide.device)
        self._sums[key] = total.add_(wide) if statistic.reduce == "sum" else torch.maximum(total, wide)
        self._counts[key] += count
