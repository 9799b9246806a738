"""What a batch brings, handed to the statistics that read it: running sums, exact under any split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.sums import Sums, Surroundings, finite
from ffnscope.errors import UsageError
from ffnscope.ffn.projection import reuse
from ffnscope.registry import STATISTICS
from ffnscope.rules import GRADIENTS, MARKS, NEXT, ORDER, Statistic
from ffnscope.types import ChannelStats, FFNSite, check_core


class Accumulator:
    """Sums of the requested statistics for several sites.

    ``begin`` sets the masks of the coming batch; ``observe`` and ``observe_gradient`` are the callbacks of the taps for
    h and g, ``observe_signal`` for x, y and dy. A statistic is taken when the last signal that it reads has come.

    Raises:
        UsageError: a gradient statistic asks for every k-th token (its mean would have no fixed denominator), or a
            statistic reads the core, which was not given for every site, or is no set of channels, or one joins
            signals of forward and backward of an FFN that several layers share.
        UsageError, DeviceError: later, see `Sums.add`.
    """

    def __init__(
        self,
        sites: Sequence[FFNSite],
        names: Iterable[str],
        core: Mapping[FFNSite, Tensor] | None = None,
        around: Surroundings | None = None,
    ):
        self.sites = tuple(sites)
        self.core = dict(core or {})
        for site, index in self.core.items():
            check_core(site, index)
        statistics = [STATISTICS.get(n) for n in names]
        self.forward = [s for s in statistics if not s.needs_gradient]
        self.backward = [s for s in statistics if s.needs_gradient]
        self.sums = Sums(self.sites, (*self.forward, *self.backward), self.core, around)
        for statistic in statistics:
            self._check(statistic)
        self._before = {b: a for a, b in self.sums.around.following.items() if a in self.sites}
        self._finite: dict[tuple[FFNSite, bool], Tensor] = {}  # of a site's activations and of its gradients
        self._held: dict[FFNSite, dict[str, Tensor]] = {}
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
        documents: Tensor | None = None,
        forward: bool = True,
        backward: bool = True,
    ) -> None:
        """Announce a batch: which tokens are not padding [batch, T], how many are predicted, what is observed.

        Gradient statistics of experts need ``targets`` [batch, T] too: which tokens are predicted; statistics by
        document the group of ``documents`` [batch] of each window.
        """
        self._rows = TokenRows(valid, targets, documents)
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
        before = self._before.get(site)
        if before is not None and self._reads(before, "next_h"):
            self.observe_signal(before, "next_h", h)

    def observe_gradient(self, site: FFNSite, h: Tensor, g: Tensor) -> None:
        """Take h and g [batch, T, d_ff] of one batch."""
        self._held.setdefault(site, {})["h"] = h
        self.observe_signal(site, "g", g)
        before = self._before.get(site)
        if before is not None and self._reads(before, "next_q"):
            self.observe_signal(before, "next_q", h * g)

    def observe_signal(self, site: FFNSite, name: str, value: Tensor) -> None:
        """Take one signal [batch, T, ...] of one batch, and every statistic that it completes."""
        held = self._held.setdefault(site, {})
        held[name] = value
        here = [s for s in self._active if self.sums.around.takes(site, s)]
        later = {r for s in here if ORDER.index(_last(s)) > ORDER.index(name) for r in s.reads}
        if name == "y" and "y" in later:
            held[name] = value.clone()  # some models add the attention's output to it in place
        due = [s for s in here if _last(s) == name]
        rows: dict[tuple[str, int], Tensor] = {}
        for read, every in dict.fromkeys((r, s.every) for s in due for r in s.reads if r not in MARKS):
            rows[read, every] = self._take(site, held[read], every)
        if not all(len(part) for part in rows.values()):
            due = []  # an expert without counted tokens
        shown = {(r, s.every) for s in due if _shows_nan(self._add(site, s, rows)) for r in s.reads}
        for (read, every), part in rows.items():
            if not {(read, every), (read, 1)} & shown:  # no sum of vectors would show NaN in it
                kind = site, read in GRADIENTS
                self._finite[kind] = finite(part) & self._finite[kind] if kind in self._finite else finite(part)
        for done in [k for k in held if k not in later]:
            del held[done]

    def first_not_finite(self, *, matrices: bool = True) -> FFNSite | None:
        """Return the site where signals or sums turned NaN or infinite, or None.

        Activations are looked through in the order of the sites, then gradients from the last site to the first: the
        ways that they flow. Without ``matrices`` only signals and vectors are looked at, which is cheaper: it misses
        finite signals whose products overflow.
        """
        sums = [v for v in self.sums.values.values() if v.is_floating_point() and (matrices or v.dim() == 1)]
        if _all_true([finite(v) for v in sums] + list(self._finite.values())):
            return None
        forward, backward = [s.name for s in self.forward], [s.name for s in self.backward]
        bad = [s for s in self.sites if not self._is_finite(s, forward, False)]
        return bad[0] if bad else next(s for s in reversed(self.sites) if not self._is_finite(s, backward, True))

    def result(self, *, copy: bool = True) -> dict[FFNSite, ChannelStats]:
        """Statistics of every site on the CPU.

        With ``copy`` false they are the sums themselves where these are on the CPU: they change with the next batch,
        and take no more memory.
        """
        return self.sums.result(copy=copy)

    def restore(self, stats: Iterable[ChannelStats]) -> None:
        """Continue from sums that were saved."""
        self.sums.restore(stats)

    def _take(self, site: FFNSite, signal: Tensor, every: int = 1) -> Tensor:
        assert self._rows is not None, "begin was not called"
        rows = self._rows.take(site, signal, every)
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def _add(self, site: FFNSite, statistic: Statistic, rows: Mapping[tuple[str, int], Tensor]) -> Tensor:
        signals = [self._mark(site, r) if r in MARKS else rows[r, statistic.every] for r in statistic.reads]
        first = rows[next(r for r in statistic.reads if r not in MARKS), statistic.every]
        count = first.shape[0]
        if statistic.needs_gradient:
            assert self._rows is not None, "begin was not called"
            count = self._n_targets if site.expert is None else self._rows.n_targets(site)
        return self.sums.add(site, statistic, signals, count)

    def _mark(self, site: FFNSite, name: str) -> Tensor:
        assert self._rows is not None, "begin was not called"
        return self.core[site] if name == "core" else self._rows.mark(site, name)

    def _reads(self, site: FFNSite, signal: str) -> bool:
        """Whether a statistic of the coming batch reads this signal of the next FFN."""
        return any(signal in s.reads and self.sums.around.takes(site, s) for s in self._active)

    def _check(self, statistic: Statistic) -> None:
        if statistic.needs_gradient and statistic.every != 1:
            raise UsageError(
                f"statistic {statistic.name!r} reads gradients of every {statistic.every}th token; gradient "
                "statistics are divided by the predicted tokens, so they read all: register it with every=1."
            )
        shared = next((s for s in self.sites if s.n_uses > 1 and s.role in statistic.at), None)
        if shared is not None and _joins_passes(statistic):
            raise UsageError(
                f"statistic {statistic.name!r} reads {', '.join(statistic.reads)} together, of several moments of a "
                f"batch; {shared.name} {reuse(shared)}, so it cannot be told which belong together. "
                "Leave out the metrics that need it, or this FFN (model.tracked_layers, --tracked)."
            )
        missing = [s.name for s in self.sites if self.sums.around.takes(s, statistic) and s not in self.core]
        if statistic.needs_core and missing:
            raise UsageError(
                f"statistic {statistic.name!r} reads the supernode core, which is not known for {missing[0]}. "
                "Calibrate for scar_loss_proxy first, and pass core=top_core(scores) to a second pass."
            )

    def _is_finite(self, site: FFNSite, names: Sequence[str], gradients: bool) -> bool:
        seen = self._finite.get((site, gradients))
        return self.sums.is_finite(site, names) and (seen is None or bool(seen))


def _joins_passes(statistic: Statistic) -> bool:
    """Whether signals of the forward wait for the backward (h comes again with g), or for another FFN."""
    if set(NEXT) & set(statistic.reads):
        return True
    waits = {"x", "y"} | ({"h"} if "g" not in statistic.reads else set())
    return statistic.needs_gradient and bool(waits & set(statistic.reads))


def _last(statistic: Statistic) -> str:
    """Signal that comes last of those that a statistic reads."""
    return max((r for r in statistic.reads if r not in MARKS), key=ORDER.index)


def _shows_nan(added: Tensor) -> bool:
    """Whether what was added shows NaN of its signals when sums are looked at; whole numbers do not."""
    return added.dim() == 1 and added.is_floating_point()


def _all_true(flags: Sequence[Tensor]) -> bool:
    """Whether all boolean scalars are True, with one transfer per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(group).all()) for group in by_device.values())
