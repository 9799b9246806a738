"""Running sums of statistics over batches, exact under any split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ffnscope.calibrate.rows import TokenRows
from ffnscope.errors import UsageError
from ffnscope.registry import SIGNALS, STATISTICS, Statistic
from ffnscope.types import ChannelStats, FFNSite, check_core


class Accumulator:
    """Sums of the requested statistics for several sites.

    ``begin`` sets the masks of the coming batch; ``observe`` and ``observe_gradient`` are the callbacks of the taps for
    h and g, ``observe_signal`` for x, y and dy. A statistic is taken when the last signal that it reads has come.

    Raises:
        UsageError: a gradient statistic asks for every k-th token (its mean would have no fixed denominator), or a
            statistic reads the core, which was not given for every site, or is no set of channels; later, a statistic
            returned another shape than it declares.
    """

    def __init__(self, sites: Sequence[FFNSite], names: Iterable[str], core: Mapping[FFNSite, Tensor] | None = None):
        self.sites = tuple(sites)
        self.core = dict(core or {})
        for site, index in self.core.items():
            check_core(site, index)
        statistics = [STATISTICS.get(n) for n in names]
        self.forward = [s for s in statistics if not s.needs_gradient]
        self.backward = [s for s in statistics if s.needs_gradient]
        for statistic in statistics:
            self._check(statistic)
        self._sums: dict[tuple[FFNSite, str], Tensor] = {}
        self._counts: dict[tuple[FFNSite, str], int] = {}
        self._finite: dict[FFNSite, Tensor] = {}
        self._held: dict[FFNSite, dict[str, Tensor]] = {}
        self._places: dict[tuple[FFNSite, str], Tensor] | None = None
        self._active: list[Statistic] = statistics
        self._rows: TokenRows | None = None
        self._n_targets = 0

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals beyond h and g that the statistics of the coming batch read: of x, y and dy."""
        read = {name for s in self._active for name in s.reads}
        return tuple(name for name in ("x", "y", "dy") if name in read)

    @property
    def reads_activation(self) -> bool:
        """Whether a statistic of the coming batch reads h before g comes, which brings h again."""
        return any("h" in s.reads and _last(s) != "g" for s in self._active)

    def begin(
        self,
        valid: Tensor,
        n_targets: int,
        *,
        targets: Tensor | None = None,
        forward: bool = True,
        backward: bool = True,
    ) -> None:
        """Announce a batch: which tokens are not padding [batch, T], how many are predicted, what is observed.

        Gradient statistics of experts need ``targets`` [batch, T] too: which tokens are predicted.
        """
        self._rows = TokenRows(valid, targets)
        self._n_targets = n_targets
        self._held.clear()
        self._active = [*(self.forward if forward else ()), *(self.backward if backward else ())]

    def observe_routing(self, site: FFNSite, tokens: Tensor) -> None:
        """Take the tokens of one expert, [n] indices in batch * T, before its signals."""
        assert self._rows is not None, "begin was not called"
        self._rows.route(site, tokens)

    def observe(self, site: FFNSite, h: Tensor) -> None:
        """Take h [batch, T, d_ff] of one batch."""
        self.observe_signal(site, "h", h)

    def observe_gradient(self, site: FFNSite, h: Tensor, g: Tensor) -> None:
        """Take h and g [batch, T, d_ff] of one batch."""
        self._held.setdefault(site, {})["h"] = h
        self.observe_signal(site, "g", g)

    def observe_signal(self, site: FFNSite, name: str, value: Tensor) -> None:
        """Take one signal [batch, T, ...] of one batch, and every statistic that it completes."""
        held = self._held.setdefault(site, {})
        held[name] = value
        later = {r for s in self._active if SIGNALS.index(_last(s)) > SIGNALS.index(name) for r in s.reads}
        if name == "y" and "y" in later:
            held[name] = value.clone()  # some models add the attention's output to it in place
        due = [s for s in self._active if _last(s) == name]
        rows: dict[tuple[str, int], Tensor] = {}
        for read, every in dict.fromkeys((r, s.every) for s in due for r in s.reads if r != "core"):
            rows[read, every] = self._take(site, held[read], every)
        values = [self._add(site, s, rows) for s in due if all(len(r) for r in rows.values())]
        if values and not any(v.is_floating_point() for v in values):  # whole numbers cannot show NaN
            seen = [torch.isfinite(r).all() for r in rows.values()]
            self._finite[site] = torch.stack([*seen, self._finite.get(site, seen[0])]).all()
        for done in [k for k in held if k not in later]:
            del held[done]

    def first_not_finite(self) -> FFNSite | None:
        """Return the site where sums turned NaN or infinite, or None.

        Activations are looked through in the order of the sites, then gradients from the last site to the first: the
        ways that they flow.
        """
        sums = [v for v in self._sums.values() if v.is_floating_point()]
        if _all_true([_finite(v) for v in sums] + list(self._finite.values())):
            return None
        forward, backward = [s.name for s in self.forward], [s.name for s in self.backward]
        bad = [s for s in self.sites if not self._is_finite(s, forward)]
        return bad[0] if bad else next(s for s in reversed(self.sites) if not self._is_finite(s, backward))

    def result(self, *, copy: bool = True) -> dict[FFNSite, ChannelStats]:
        """Statistics of every site on the CPU.

        With ``copy`` false they are the sums themselves where these are on the CPU: they change with the next batch,
        and take no more memory.
        """
        found: dict[FFNSite, ChannelStats] = {}
        for site in self.sites:
            # an expert that no token has reached has zeros of count 0
            wanted = [
                s for s in (*self.forward, *self.backward) if site.expert is not None or (site, s.name) in self._sums
            ]
            found[site] = ChannelStats(
                site,
                {s.name: self._sum(site, s).to("cpu", copy=copy) for s in wanted},
                {s.name: self._counts.get((site, s.name), 0) for s in wanted},
                {s.name: s.reduce for s in wanted},
            )
        return found

    def restore(self, stats: Iterable[ChannelStats]) -> None:
        """Continue from sums that were saved."""
        for part in stats:
            for name, value in part.values.items():
                if part.counts[name] or part.reductions[name] == "sum":  # a maximum over nothing is none
                    self._sums[part.site, name] = value.clone()
                    self._counts[part.site, name] = part.counts[name]

    def _sum(self, site: FFNSite, statistic: Statistic) -> Tensor:
        key = (site, statistic.name)
        return (
            self._sums[key] if key in self._sums else torch.zeros(self._shape(site, statistic), dtype=_dtype(statistic))
        )

    def _shape(self, site: FFNSite, statistic: Statistic) -> list[int]:
        core = self.core[site].numel() if site in self.core else 0
        sizes = {"d_ff": site.d_ff, "d_model": site.d_model, "core": core}
        return [size if isinstance(size, int) else sizes[size] for size in statistic.shape]

    def _take(self, site: FFNSite, signal: Tensor, every: int = 1) -> Tensor:
        assert self._rows is not None, "begin was not called"
        rows = self._rows.take(site, signal, every)
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def _add(self, site: FFNSite, statistic: Statistic, rows: Mapping[tuple[str, int], Tensor]) -> Tensor:
        key = (site, statistic.name)
        signals = [self.core[site] if r == "core" else rows[r, statistic.every] for r in statistic.reads]
        first = rows[next(r for r in statistic.reads if r != "core"), statistic.every]
        count = first.shape[0]
        if statistic.needs_gradient:
            assert self._rows is not None, "begin was not called"
            count = self._n_targets if site.expert is None else self._rows.n_targets(site)
        if self._places is None:
            self._places = self._reserve(first.device)
        self._counts[key] = self._counts.get(key, 0) + count
        if statistic.counts:
            total = self._sums[key] if key in self._sums else self._places.pop(key)
            self._sums[key] = total = total.to(first.device)
            statistic.fn(total, *signals)
            return total
        value: Tensor = statistic.fn(*signals)
        if value.device.type == "mps":
            value = value.cpu()  # no float64 there
        if key not in self._sums:
            self._sums[key] = _start(site, statistic, self._places.pop(key), value)
            return value
        total = self._sums[key].to(value.device)
        self._sums[key] = (
            total.add_(value) if statistic.reduce == "sum" else torch.maximum(total, value.to(total), out=total)
        )
        return value

    def _reserve(self, device: torch.device) -> dict[tuple[FFNSite, str], Tensor]:
        """Memory of all sums that are still to begin, taken at once: values between them would leave holes."""
        places: dict[tuple[FFNSite, str], Tensor] = {}
        with torch.inference_mode(False):  # sums made in inference mode could not be used in autograd
            for site in self.sites:
                for statistic in (*self.forward, *self.backward):
                    if (site, statistic.name) not in self._sums:
                        room = "cpu" if device.type == "mps" else device
                        make = torch.zeros if statistic.counts else torch.empty
                        shape = self._shape(site, statistic)
                        places[site, statistic.name] = make(shape, dtype=_dtype(statistic), device=room)
        return places

    def _check(self, statistic: Statistic) -> None:
        if statistic.needs_gradient and statistic.every != 1:
            raise UsageError(
                f"statistic {statistic.name!r} reads gradients of every {statistic.every}th token; gradient "
                "statistics are divided by the predicted tokens, so they read all: register it with every=1."
            )
        missing = [s.name for s in self.sites if s not in self.core]
        if statistic.needs_core and missing:
            raise UsageError(
                f"statistic {statistic.name!r} reads the supernode core, which is not known for {missing[0]}. "
                "Calibrate for scar_loss_proxy first, and pass core=top_core(scores) to a second pass."
            )

    def _is_finite(self, site: FFNSite, names: Sequence[str]) -> bool:
        sums = [self._sums[site, n] for n in names if (site, n) in self._sums]
        seen = self._finite.get(site)
        return all(bool(_finite(v)) for v in sums) and (seen is None or bool(seen))


def _start(site: FFNSite, statistic: Statistic, place: Tensor, value: Tensor) -> Tensor:
    """Begin a sum with its first value, in the memory that was reserved for it."""
    if value.shape != place.shape:
        raise UsageError(
            f"statistic {statistic.name!r} returned {tuple(value.shape)} for {site.name}; expected "
            f"{tuple(place.shape)} = {statistic.shape}, the shape that it declares."
        )
    with torch.inference_mode(False):
        place = place if place.device == value.device else torch.empty_like(place, device=value.device)
        return place.copy_(value)


def _dtype(statistic: Statistic) -> torch.dtype:
    return torch.int32 if statistic.counts else torch.float64


def _last(statistic: Statistic) -> str:
    """Signal that comes last of those that a statistic reads."""
    return max((r for r in statistic.reads if r != "core"), key=SIGNALS.index)


def _finite(value: Tensor) -> Tensor:
    """Whether a sum is finite; NaN and infinity show in the total of a matrix, which is cheaper to look at."""
    return torch.isfinite(value.sum() if value.dim() > 1 else value).all()


def _all_true(flags: Sequence[Tensor]) -> bool:
    """Whether all boolean scalars are True, with one transfer per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(group).all()) for group in by_device.values())
