"""The density above which reading all rows is faster than gathering some: measured on this machine, once per shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

DENSITIES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
ROUNDS = 5
MARGIN = 0.97
"""Share of the dense time that the sparse form may take: so much is noise."""

_measured: dict[Hashable, float] = {}


def break_even(
    shape: Hashable,
    d_ff: int,
    dense: Sequence[Callable[[], object]],
    sparse: Sequence[Callable[[Tensor], object]],
    device: torch.device,
) -> float:
    """Largest density at which the sparse form of an FFN is faster than the dense one, 0 where it never is.

    All densities take turns with the dense form, on random channels; the fastest of five rounds counts, which is what
    another job on the machine disturbs least. Between two densities the times are taken as linear.

    Args:
        shape: what the answer depends on; a second call with the same one measures nothing.
        d_ff: number of channels.
        dense: the dense form of several FFNs of this shape, which take turns, so that weights come from memory as
            they do in a model and not from the cache.
        sparse: the sparse form of the same ones, given int32 indices [k].
        device: where they run.
    """
    key = (shape, d_ff, str(device), torch.get_num_threads())
    if key not in _measured:
        _measured[key] = _measure(d_ff, dense, sparse, device)
    return _measured[key]


def ratios(
    dense: Sequence[Callable[[], object]], sparse: Sequence[Callable[[], object]], device: torch.device
) -> list[float]:
    """Time of every sparse form over that of its dense one: all of them in turn, the fastest of five rounds counts."""
    best = [[float("inf")] * len(forms) for forms in (dense, sparse)]
    for round_ in range(ROUNDS + 1):  # the first one compiles and allocates
        for forms, times in zip((dense, sparse), best, strict=True):
            for place, run in enumerate(forms):
                seconds = _seconds(run, device)
                if round_:
                    times[place] = min(times[place], seconds)
    return [b / a for a, b in zip(*best, strict=True)]


def _measure(
    d_ff: int,
    dense: Sequence[Callable[[], object]],
    sparse: Sequence[Callable[[Tensor], object]],
    device: torch.device,
) -> float:
    random = torch.Generator().manual_seed(0)
    best = dict.fromkeys((0.0, *DENSITIES), float("inf"))  # 0: the dense form
    turn = 0
    for round_ in range(ROUNDS + 1):  # the first one compiles and allocates
        for density in best:
            turn += 1
            index = torch.randperm(d_ff, generator=random)[: round(density * d_ff)].sort().values.int().to(device)
            run, ffn = dense[turn % len(dense)], sparse[turn % len(sparse)]
            seconds = _seconds(run if density == 0 else lambda ffn=ffn, index=index: ffn(index), device)
            if round_:
                best[density] = min(best[density], seconds)
    return _crossing([best[density] for density in DENSITIES], MARGIN * best[0.0])


def _crossing(times: Sequence[float], dense: float) -> float:
    """Where the times at DENSITIES first exceed that of the dense form."""
    over = next((i for i, seconds in enumerate(times) if seconds > dense), None)
    if over is None:
        return 1.0
    if over == 0:
        return 0.0
    share = (dense - times[over - 1]) / (times[over] - times[over - 1])
    return DENSITIES[over - 1] + share * (DENSITIES[over] - DENSITIES[over - 1])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
