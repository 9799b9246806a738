"""Times of an FFN that reads rows over those of the dense one: measured on this machine, once per shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
ROUNDS = 7
MOST_ROUNDS = 49
SECONDS = 0.3
"""A measurement has seven rounds, and more of them, up to 49, until it took so long: small FFNs are quick and noisy."""
MARGIN = 0.95
"""Share of the dense time that the sparse form may take: so much is noise."""


@dataclass(frozen=True, slots=True)
class RowTimes:
    """Time of reading rows over that of dense products.

    Attributes:
        ratios: at each of `DENSITIES`.
    """

    ratios: tuple[float, ...]

    @property
    def limit(self) -> float:
        """Largest density at which rows are faster, by the margin of noise; 0 where they never are."""
        over = next((i for i, ratio in enumerate(self.ratios) if ratio > MARGIN), None)
        if over is None:
            return 1.0
        if over == 0:
            return 0.0
        before, after = self.ratios[over - 1], self.ratios[over]
        share = (MARGIN - before) / (after - before)
        return DENSITIES[over - 1] + share * (DENSITIES[over] - DENSITIES[over - 1])

    def at(self, density: float) -> float:
        """The ratio at a density in [0, 1]; between two that were measured it is taken as linear, below all as flat."""
        over = next((i for i, one in enumerate(DENSITIES) if one >= density), len(DENSITIES) - 1)
        if over == 0:
            return self.ratios[0]
        share = (density - DENSITIES[over - 1]) / (DENSITIES[over] - DENSITIES[over - 1])
        return self.ratios[over - 1] + share * (self.ratios[over] - self.ratios[over - 1])


_rows: dict[Hashable, RowTimes] = {}
_shares: dict[Hashable, float] = {}


def row_times(
    shape: Hashable,
    d_ff: int,
    dense: Sequence[Callable[[], object]],
    sparse: Sequence[Callable[[Tensor], object]],
    device: torch.device,
) -> RowTimes:
    """Time an FFN that reads rows against the dense one, at several densities.

    In every round the dense form runs first and last and all densities, on random channels, between; the ratio of
    that round is to the mean of the two, so a machine that gets slower in the meantime does not show. The upper
    quartile of the rounds counts, after one that compiles and allocates: rows have to be faster in three rounds of
    four, and what another job disturbs for less than a quarter of them is not in it. FFNs take turns, and before
    each call the one before it runs dense, so that weights and code come from where they do in a decoding step.

    Args:
        shape: what the answer depends on; a second call with the same one measures nothing.
        d_ff: number of channels.
        dense: the dense form of FFNs of this shape, as many as there are.
        sparse: the sparse form of the same ones, given int32 indices [k].
        device: where they run.
    """
    key = (shape, d_ff, str(device), torch.get_num_threads())
    if key not in _rows:
        _rows[key] = RowTimes(_measure(d_ff, dense, sparse, device))
    return _rows[key]


def share_of_dense(
    what: Hashable, dense: Sequence[Callable[[], object]], runs: Sequence[Callable[[], object]], device: torch.device
) -> float:
    """Time of what runs before an FFN over that of its dense form: the upper quartile of rounds, as in `row_times`.

    Args:
        what: what the answer depends on; a second call with the same one measures nothing.
        dense: the dense form of FFNs.
        runs: what is timed, of some of them.
        device: where they run.
    """
    key = (what, str(device), torch.get_num_threads())
    if key not in _shares:
        rounds: list[float] = []
        for turn in _turns():
            dense[turn % len(dense)]()
            whole = seconds(dense[(turn + 1) % len(dense)], device)
            one = seconds(runs[turn % len(runs)], device)
            rounds += [one / whole] if turn else []
        _shares[key] = _upper_quartile(rounds)
    return _shares[key]


def _turns() -> Iterator[int]:
    """0, of the round that compiles and allocates and does not count, then 1, 2, ... of those that do."""
    yield 0
    start = time.perf_counter()
    for turn in range(1, MOST_ROUNDS + 1):
        if turn > ROUNDS and time.perf_counter() - start > SECONDS:
            return
        yield turn


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call, with what it started on its device."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _measure(
    d_ff: int,
    dense: Sequence[Callable[[], object]],
    sparse: Sequence[Callable[[Tensor], object]],
    device: torch.device,
) -> tuple[float, ...]:
    random = torch.Generator().manual_seed(0)
    rounds: list[list[float]] = []
    turn = 0
    for round_ in _turns():
        times: list[float] = []
        for density in (0.0, *DENSITIES, 0.0):  # 0: the dense form
            turn += 1
            index = torch.randperm(d_ff, generator=random)[: round(density * d_ff)].sort().values.int().to(device)
            run, ffn = dense[turn % len(dense)], sparse[turn % len(sparse)]
            dense[(turn - 1) % len(dense)]()
            times.append(seconds(run if density == 0 else lambda ffn=ffn, index=index: ffn(index), device))
        whole = (times[0] + times[-1]) / 2
        rounds += [[one / whole for one in times[1:-1]]] if round_ else []
    return tuple(_upper_quartile(column) for column in zip(*rounds, strict=True))


def _upper_quartile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=4)[2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
