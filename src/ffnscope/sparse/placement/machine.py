"""What a machine with two devices takes for the channels of a token; and how fast a device reads memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError

PROBE_BYTES, ROUNDS, WIDTH = 2**28, 5, 4096


@dataclass(frozen=True, slots=True)
class Machine:
    """Two devices that decode one token at a time, each bound by reading weights from its own memory.

    An FFN takes as long as the slower of its two parts, which run at the same time, and a fixed time for sending x and
    fetching the result where both take part.

    Attributes:
        fast: bytes per second that the device of the hot channels reads.
        slow: the same of the other one.
        sync_seconds: of an FFN of which both devices compute a part.
        other_seconds: per token, of all that is not FFN.

    Raises:
        UsageError: a bandwidth is not positive, or a time negative.
    """

    fast: float
    slow: float
    sync_seconds: float = 0.0
    other_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fast", "slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be a bandwidth in bytes per second; got {getattr(self, name):g}.")
        for name in ("sync_seconds", "other_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be 0 or more; got {getattr(self, name):g}.")

    def seconds(self, hot: Tensor, cold: Tensor) -> Tensor:
        """Time of FFNs that read ``hot`` and ``cold`` bytes, elementwise."""
        times = torch.maximum(hot / self.fast, cold / self.slow)
        return times + self.sync_seconds * ((hot > 0) & (cold > 0))


@torch.no_grad()
def probe_bandwidth(device: torch.device | str = "cpu", n_bytes: int = PROBE_BYTES) -> float:
    """Bytes per second with which a device reads a float32 matrix in a product with a vector: the best of five rounds.

    The matrix must be larger than the caches, and is allocated for the probe. With torch's number of threads.

    Raises:
        UsageError: less than one row.
    """
    if n_bytes < 4 * WIDTH:
        raise UsageError(f"n_bytes must be at least {4 * WIDTH}, one row of the probe; got {n_bytes}.")
    device = torch.device(device)
    weight = torch.ones(n_bytes // (4 * WIDTH), WIDTH, device=device)
    x = torch.ones(WIDTH, device=device)
    times: list[float] = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        torch.mv(weight, x)
        _wait(device)
        times.append(time.perf_counter() - start)
    return weight.nbytes / min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
