"""Times of an FFN that reads rows over those of the dense one: measured on this machine, once per shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

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
        masked: of dense products under a mask, which run where rows are not read.
    """

    ratios: tuple[float, ...]
    masked: float = 0.0

    @property
    def limit(self) -> float:
        """Largest density at which rows are faster by the margin of noise, or no slower than masked; 0 if never."""
        allowed = max(MARGIN, self.masked)
        over = next((i for i, ratio in enumerate(self.ratios) if ratio > allowed), None)
        if over is None:
            return 1.0
        if over == 0:
            return 0.0
        before, after = self.ratios[over - 1], self.ratios[over]
        share = (allowed - before) / (after - before)
        return DENSITIES[over - 1] + share * (DENSITIES[over] - DENSITIES[over - 1])


_rows: dict[Hashable, RowTimes] = {}
_shares: dict[Hashable, float] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Forms:
    """What FFNs of one shape may run, each of as many FFNs as the others.

    Attributes:
        dense: all channels.
        masked: the same, with a mask on h.
        sparse: rows of channels int32 [k].
    """

    dense: Sequence[Callable[[], object]]
    masked: Sequence[Callable[[], object]]
    sparse: Sequence[Callable[[Tensor], object]]

    def call(self, what: float | str, ffn: int, index: Callable[[float], Tensor]) -> Callable[[], object]:
        """What one FFN runs: "dense", "masked", or rows of a density."""
        if isinstance(what, str):
            every = self.dense if what == "dense" else self.masked
            return every[ffn % len(every)]
        return partial(self.sparse[ffn % len(self.sparse)], index(what))


def row_times(shape: Hashable, d_ff: int, forms: Forms, device: torch.device) -> RowTimes:
    """Time an FFN that reads rows against the dense one, at several densities.

    In every round the dense form runs first and last, and all densities, on random channels, and the masked form
    between; the ratio of that round is to the mean of the two, so a machine that gets slower in the meantime does not
    show. The upper quartile of the rounds counts, after one that compiles and allocates: rows have to be faster in
    three rounds of four, and what another job disturbs for less than a quarter of them is not in it. FFNs take turns,
    and before each call the one before it runs in the same form, so that weights and code come from where they do in
    a decoding step.

    Args:
        shape: what the answer depends on; a second call with the same one measures nothing.
        d_ff: number of channels.
        forms: of FFNs of this shape, as many as there are.
        device: where they run.
    """
    key = (shape, d_ff, str(device), torch.get_num_threads())
    if key not in _rows:
        *ratios, masked = zip(*_rounds(d_ff, forms, device), strict=True)
        _rows[key] = RowTimes(tuple(map(_upper_quartile, ratios)), statistics.median(masked))
    return _rows[key]


def share_of_dense(
    what: Hashable, dense: Sequence[Callable[[], object]], runs: Sequence[Callable[[], object]], device: torch.device
) -> float:
    """Time of another form of FFNs over that of the dense one: the upper quartile of rounds, as in `row_times`.

    Args:
        what: what the answer depends on; a second call with the same one measures nothing.
        dense: the dense form of FFNs.
        runs: the other form, of some of them.
        device: where they run.
    """
    key = (what, str(device), torch.get_num_threads())
    if key not in _shares:
        rounds: list[float] = []
        for turn in _turns():
            whole = _after_another(dense, turn, device)
            one = _after_another(runs, turn + len(runs) // 2, device)  # of FFNs that have left the caches since
            rounds += [one / whole] if turn else []
        _shares[key] = _upper_quartile(rounds)
    return _shares[key]


def _after_another(forms: Sequence[Callable[[], object]], turn: int, device: torch.device) -> float:
    """Seconds of a form after it ran in the FFN before."""
    forms[turn % len(forms)]()
    return seconds(forms[(turn + 1) % len(forms)], device)


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


def _rounds(d_ff: int, forms: Forms, device: torch.device) -> list[list[float]]:
    """Ratios to dense of every round: at all densities, and masked."""
    random = torch.Generator().manual_seed(0)

    def index(density: float) -> Tensor:
        return torch.randperm(d_ff, generator=random)[: round(density * d_ff)].sort().values.int().to(device)

    rounds: list[list[float]] = []
    turn = 0
    for round_ in _turns():
        times: list[float] = []
        for what in ("dense", *DENSITIES, "masked", "dense"):
            turn += 1
            forms.call(what, turn - 1, index)()  # the FFN before, not timed
            times.append(seconds(forms.call(what, turn, index), device))
        whole = (times[0] + times[-1]) / 2
        rounds += [[one / whole for one in times[1:-1]]] if round_ else []
    return rounds


def _upper_quartile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=4)[2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
