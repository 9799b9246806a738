"""The sums of a pass: their memory, and how the part of a batch is added to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ffnscope.calibrate.forward import memory_errors
from ffnscope.calibrate.parallel import Ranks
from ffnscope.errors import UsageError
from ffnscope.registry import METRICS
from ffnscope.rules import Statistic
from ffnscope.types import ChannelStats, FFNSite

Key = tuple[FFNSite, str]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is around sites: the FFN of the next layer where it is one dense FFN, and how many groups of documents."""

    following: Mapping[FFNSite, FFNSite] = field(default_factory=dict[FFNSite, FFNSite])
    n_documents: int = 0

    def takes(self, site: FFNSite, statistic: Statistic) -> bool:
        """Whether a statistic is taken at a site."""
        return site.role in statistic.at and (site in self.following or not statistic.reads_next)

    def sizes(self, statistic: Statistic, site: FFNSite, core_size: int) -> tuple[int, ...]:
        """Shape of a statistic at a site."""
        n_next = self.following[site].d_ff if site in self.following else 0
        return statistic.sizes(site, core_size, self.n_documents, n_next)


def following(sites: Sequence[FFNSite]) -> dict[FFNSite, FFNSite]:
    """The FFN of the next layer that has one, for each dense FFN whose next layer holds one dense FFN alone.

    ``sites`` are all FFNs of a model, in the order of its layers. Experts, and FFNs beside them, follow no one.
    """
    layers: dict[int, list[FFNSite]] = {}
    for site in sites:
        if site.role == "ffn":
            layers.setdefault(site.layer, []).append(site)
    alone = [found[0] if len(found) == 1 and found[0].expert is None else None for found in layers.values()]
    return {a: b for a, b in pairwise(alone) if a is not None and b is not None}


class Sums:
    """Float64 sums (int32 where they are counts) of statistics for several sites, and the tokens that they stand for.

    ``core`` gives the number of core channels of each site, ``around`` what else tells shapes. On a device without
    float64 (mps) the sums are on the CPU.
    """

    def __init__(
        self,
        sites: Sequence[FFNSite],
        statistics: Sequence[Statistic],
        core: Mapping[FFNSite, Tensor],
        around: Surroundings | None = None,
    ):
        self.sites = tuple(sites)
        self.statistics = tuple(statistics)
        self.around = around or Surroundings()
        self.values: dict[Key, Tensor] = {}
        self.places: dict[Key, Tensor] | None = None
        self._counts: dict[Key, int] = {}
        self._shapes = {
            (site, s.name): self.around.sizes(s, site, core[site].numel() if site in core else 0)
            for site in sites
            for s in statistics
            if self.around.takes(site, s)
        }

    def add(self, site: FFNSite, statistic: Statistic, signals: Sequence[Tensor], count: int) -> Tensor:
        """Add the statistic of ``signals``, rows of ``count`` counted tokens; return what was added, or was added to.

        Raises:
            UsageError: it has another shape than it declares.
            DeviceError: there is no memory for the sums; the statistic that asks for most of it is named.
        """
        key = (site, statistic.name)
        device = next(_home(s.device) for s in signals if s.is_floating_point())
        if self.places is None:
            self.places = self._reserve(device)
        self._counts[key] = self._counts.get(key, 0) + count
        if statistic.adds:
            total = self.values[key] if key in self.values else self.places.pop(key)
            self.values[key] = total = total.to(device)
            statistic.fn(total, *(s.to(device) for s in signals))
            return total
        value: Tensor = statistic.fn(*signals).to(device)
        if key not in self.values:
            self.values[key] = self._start(site, statistic, self.places.pop(key), value)
            return value
        total = self.values[key].to(device)
        self.values[key] = (
            total.add_(value) if statistic.reduce == "sum" else torch.maximum(total, value.to(total), out=total)
        )
        return value

    def restore(self, stats: Iterable[ChannelStats]) -> None:
        """Continue from sums that were saved."""
        for part in stats:
            for name, value in part.values.items():
                if part.counts[name] or part.reductions[name] == "sum":  # a maximum over nothing is none
                    self.values[part.site, name] = value.clone()
                    self._counts[part.site, name] = part.counts[name]

    def result(self, *, copy: bool = True, sites: Sequence[FFNSite] | None = None) -> dict[FFNSite, ChannelStats]:
        """Statistics of these sites (None = all) on the CPU; without ``copy`` the sums where they are there already.

        An expert that no token has reached has zeros of count 0.
        """
        found: dict[FFNSite, ChannelStats] = {}
        for site in self.sites if sites is None else sites:
            here = [s for s in self.statistics if self.around.takes(site, s)]
            begun = [s for s in here if site.expert is not None or (site, s.name) in self.values]
            found[site] = ChannelStats(
                site,
                {s.name: self._value(site, s).to("cpu", copy=copy) for s in begun},
                {s.name: self._counts.get((site, s.name), 0) for s in begun},
                {s.name: s.reduce for s in begun},
            )
        return found

    def bring_together(self, ranks: Ranks) -> None:
        """Reduce the sums of all processes to those of the leader; the others begin anew."""
        counts: list[dict[Key, int]] = ranks.gathered(self._counts)
        for site in self.sites:
            for s in self.statistics:
                key = (site, s.name)
                if not any(key in one for one in counts):
                    continue
                value = self._part(site, s)
                whole = ranks.reduced(value, s.reduce)
                if ranks.leads:
                    self.values[key] = whole.to(value.device)
                    self._counts[key] = sum(one.get(key, 0) for one in counts)
        if not ranks.leads:
            self.values.clear()
            self._counts.clear()
            self.places = None

    def _part(self, site: FFNSite, s: Statistic) -> Tensor:
        """This process's sum, or what changes nothing where it has none."""
        key = (site, s.name)
        if key in self.values:
            return self.values[key]
        if self.places is not None:
            self.places.pop(key, None)
        nothing = 0 if s.reduce == "sum" else -math.inf
        return torch.full(self._shapes[key], nothing, dtype=_dtype(s))

    def is_finite(self, site: FFNSite, names: Iterable[str]) -> bool:
        """Whether the sums of one site are finite, those that have begun."""
        return all(bool(finite(self.values[site, n])) for n in names if (site, n) in self.values)

    def _reserve(self, device: torch.device) -> dict[Key, Tensor]:
        """Memory of all sums that are still to begin, taken at once: values between them would leave holes."""
        places: dict[Key, Tensor] = {}
        with torch.inference_mode(False), memory_errors(self._too_large()):  # no inference tensors: autograd uses them
            kinds = {s.name: s for s in self.statistics}
            for (site, name), shape in self._shapes.items():
                if (site, name) not in self.values:
                    make = torch.zeros if kinds[name].adds else torch.empty
                    places[site, name] = make(shape, dtype=_dtype(kinds[name]), device=device)
        return places

    def _value(self, site: FFNSite, s: Statistic) -> Tensor:
        key = (site, s.name)
        return self.values[key] if key in self.values else torch.zeros(self._shapes[key], dtype=_dtype(s))

    def _too_large(self) -> str:
        """Text of the error when the sums do not fit: what asks for most of the memory, and how to ask for less."""
        size = {
            s.name: sum(math.prod(shape) * s.itemsize for (_, name), shape in self._shapes.items() if name == s.name)
            for s in self.statistics
        }
        largest = max(size, key=lambda name: size[name])
        readers = ", ".join(m for m in METRICS.names() if largest in METRICS.get(m).needed({}))
        cause = f"the metrics that need it ({readers})" if readers else "concentration, halo or cross_layer"
        return (
            f"out of memory for the sums of the calibration pass, {sum(size.values()) / 2**20:,.0f} MiB for "
            f"{len(self.sites)} FFNs: statistic {largest!r} alone takes {size[largest] / 2**20:,.0f} MiB. Leave out "
            f"{cause}, or calibrate fewer FFNs (model.tracked_layers, --tracked)."
        )

    def _start(self, site: FFNSite, statistic: Statistic, place: Tensor, value: Tensor) -> Tensor:
        """Begin a sum with its first value, in the memory that was reserved for it."""
        if value.shape != place.shape:
            raise UsageError(
                f"statistic {statistic.name!r} returned {tuple(value.shape)} for {site.name}; expected "
                f"{tuple(place.shape)} = {statistic.shape}, the shape that it declares."
            )
        with torch.inference_mode(False):
            place = place if place.device == value.device else torch.empty_like(place, device=value.device)
            return place.copy_(value)


def finite(value: Tensor) -> Tensor:
    """Whether a tensor is finite; NaN and infinity show in the total of a matrix, which is cheaper to look at."""
    return torch.isfinite(value.sum() if value.dim() > 1 else value).all()


def _dtype(statistic: Statistic) -> torch.dtype:
    return torch.int32 if statistic.counts else torch.float64


def _home(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # no float64 there
