"""Two processes that share the windows, against one: started by `benchmarks/scale.py` with torch.distributed.run.

    scale_ranks.py CHECKPOINT OUT SETTINGS.json

Each process has one thread, so that two of them are twice the computing power. The model is read as float64.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    import ffnscope as fs
    from ffnscope.calibrate.windows import contiguous_windows

    torch.set_num_threads(1)
    folder, out, asked = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    with fs.shared_windows() as leads:
        if not leads:
            return
        loaded = fs.load_model(fs.ModelSource(folder, device="cpu", dtype="float64"))
        shape = (asked["windows"], asked["length"])
        ids = torch.randint(0, asked["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
        windows, options = contiguous_windows(ids, "random tokens"), fs.PassOptions(batch_size=1)
        metrics = ["scar_loss_proxy", "wanda"]
        fs.calibrate(loaded.model, windows[:2], metrics, options=options)  # the others load the model now
        times: list[float] = []
        for _ in range(asked["repeats"]):
            start = time.perf_counter()
            stats: dict[Any, Any] = fs.calibrate(loaded.model, windows, metrics, options=options)
            times.append(time.perf_counter() - start)
        fs.write_stats(out / "stats.safetensors", stats.values(), {})
        fs.write_plan(out / "plan.json", fs.build_plan(fs.score(loaded.model, stats, "scar_loss_proxy"), 0.5))
        (out / "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    main()
