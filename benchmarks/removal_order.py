"""Time of a complete greedy removal order: ``python benchmarks/removal_order.py [D_FF:D_MODEL ...]``, one core."""

from __future__ import annotations

import sys
import time

import torch

from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

SHAPES = ("1536:576", "4096:1024")


def seconds(d_ff: int, d_model: int) -> tuple[float, float]:
    """Wall and processor seconds of the metric ``obs`` for random weights, with as many random tokens as channels."""
    h = torch.randn(d_ff, d_ff, generator=torch.Generator().manual_seed(0))
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", d_model, d_ff)
    stats = ChannelStats(site, {"h_outer": (h.T @ h).double()}, {"h_outer": d_ff}, {"h_outer": "sum"})
    down = torch.randn(d_model, d_ff, generator=torch.Generator().manual_seed(1))
    rule = METRICS.get("obs")
    wall, busy = time.perf_counter(), time.process_time()
    rule.fn(stats, FFNWeights(None, down.T, down))
    return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    """Print one line per shape."""
    torch.set_num_threads(1)
    for shape in sys.argv[1:] or SHAPES:
        d_ff, d_model = map(int, shape.split(":"))
        wall, busy = seconds(d_ff, d_model)
        print(f"d_ff {d_ff:6,}  d_model {d_model:6,}  {wall:8.2f} s, {busy:.2f} s of one core", flush=True)


if __name__ == "__main__":
    main()
