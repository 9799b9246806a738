"""A model that is larger than the memory it may have, through every stage; two processes against one; and faults.

    python benchmarks/scale.py --work FOLDER --gigabytes 6 --limit-gigabytes 1.5 --windows 8 --length 128 --record

Every stage is a process of its own (`benchmarks/scale_stages.py`), which is ended when its peak memory (VmHWM, mapped
pages of files included) passes the limit. A stage whose result is in FOLDER is not run again: delete FOLDER, or
FOLDER/STAGE.record.json, to measure it anew. With --record writes benchmarks/results/scale.md, which has the table of
`benchmarks/faults.py` too, as that was last recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "results" / "scale.md"
FAULTS = HERE / "results" / "faults.md"
STAGES = ("make", "idle", "calibrate", "plan", "reconstruct", "evaluate")
UNLIMITED = ("make",)
RANKS = "ranks.json"
MIB, GB = 2**20, 10**9


class StageError(SystemExit):
    """A stage failed, or took more memory than it may."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and results; kept")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="weights, 10^9 bytes")
    parser.add_argument("--limit-gigabytes", type=float, default=1.5, help="peak memory of a stage, 10^9 bytes")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--hidden", type=int, default=1024, help="d_model, a multiple of 64; d_ff is four times that")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--place", default="disk", choices=("device", "cpu", "disk"), help="where hidden states wait")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", default=",".join((*STAGES, "ranks")), help="those to run now, by commas")
    parser.add_argument("--repeats", type=int, default=3, help="of the comparison of one process with two")
    parser.add_argument("--record", action="store_true", help=f"write {OUT.relative_to(HERE.parent)}")
    parser.add_argument("--ranks-layers", type=int, default=4, help="layers of its model, of the same d_model / 2")
    return parser.parse_args()


def settings(asked: argparse.Namespace) -> dict[str, Any]:
    """What the stages are told: as many layers as make the weights at least as large as asked."""
    each = 4 if asked.dtype == "float32" else 2
    outside, block = 2 * asked.vocabulary * asked.hidden, 16 * asked.hidden**2
    layers = max(2, math.ceil((asked.gigabytes * GB / each - outside) / block))
    names = ("dtype", "hidden", "vocabulary", "windows", "length", "batch", "place", "device", "repeats")
    return {"work": str(asked.work.resolve()), "layers": layers, **{name: getattr(asked, name) for name in names}}


def memory_of(pid: int) -> dict[str, int]:
    """VmHWM, RssAnon and RssFile of a process in bytes; nothing when it has ended."""
    try:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile") if name in rows}


def run_stage(stage: str, told: Path, work: Path, limit: float) -> dict[str, Any]:
    """Run one stage, end it when it passes the limit, and return its result with the peaks of its memory."""
    result, record = (work / f"{stage}.{kind}.json" for kind in ("result", "record"))
    if result.exists() and record.exists():
        return read_record(stage, record, limit)
    child = subprocess.Popen([sys.executable, HERE / "scale_stages.py", stage, told], stderr=sys.stderr)
    peak: dict[str, int] = {}
    limited = stage not in UNLIMITED
    while child.poll() is None:
        for name, value in memory_of(child.pid).items():
            peak[name] = max(peak.get(name, 0), value)
        if limited and peak.get("VmHWM", 0) > limit:
            child.kill()
            child.wait()
            raise StageError(f"{stage}: ended at {peak['VmHWM'] / MIB:,.0f} MiB, above {limit / MIB:,.0f} MiB: {peak}")
        time.sleep(0.005)
    if child.returncode:
        raise StageError(f"{stage}: failed ({child.returncode})")
    found = json.loads(result.read_text())
    peak["VmHWM"] = found["VmHWM"]  # at its end, where no moment is missed
    found = {**found, **peak, "load": os.getloadavg()[0]}
    check_peak(stage, found, limit)
    record.write_text(json.dumps(found))
    shown = ", ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in peak.items())
    print(f"{stage}: {found['seconds']:.1f} s, {shown}", flush=True)
    return found


def check_peak(stage: str, found: dict[str, Any], limit: float) -> None:
    """Raise StageError where a stage took more than the limit."""
    if stage not in UNLIMITED and found["VmHWM"] > limit:
        peak = {name: found[name] for name in ("VmHWM", "RssAnon", "RssFile") if name in found}
        raise StageError(f"{stage}: took {found['VmHWM'] / MIB:,.0f} MiB, above {limit / MIB:,.0f} MiB: {peak}")


def read_record(stage: str, record: Path, limit: float) -> dict[str, Any]:
    """The result of a stage that was run by an earlier call, perhaps under a higher limit; raises StageError."""
    found = json.loads(record.read_text())
    check_peak(stage, found, limit)
    print(f"{stage}: is there", flush=True)
    return found


def run_ranks(size: int, work: Path, told: Path) -> Path:
    """Calibrate with this many processes; the folder of the result."""
    out = work / f"ranks{size}"
    if (out / "times.json").exists():
        print(f"{size} process(es): is there", flush=True)
        return out
    out.mkdir(exist_ok=True)
    script = [str(HERE / "scale_ranks.py"), str(work / "small"), str(out), str(told)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *script], env=env, check=True)
    return out


def ranks_settings(asked: argparse.Namespace, told: dict[str, Any]) -> dict[str, Any]:
    """What the comparison of one process with two is told: a small model in float32, on the CPU."""
    return {**told, "hidden": asked.hidden // 2, "layers": asked.ranks_layers, "dtype": "float32", "device": "cpu"}


def check_settings(path: Path, told: dict[str, Any], results: str) -> None:
    """End the program where a folder holds results of other settings."""
    if path.exists() and json.loads(path.read_text()) != told:
        raise SystemExit(
            f"{path.parent} holds results of other settings ({path}); name another folder, or delete {results}."
        )


def compare_ranks(asked: argparse.Namespace, told: dict[str, Any]) -> list[str]:
    """One process against two: lines of the table."""
    sys.path.insert(0, str(HERE))
    from scale_stages import write_model

    import ffnscope as fs

    small, path = ranks_settings(asked, told), asked.work / RANKS
    folder = asked.work / "small"
    if not (folder / "model.safetensors.index.json").exists():
        folder.mkdir(exist_ok=True)
        write_model(folder, small)
    path.write_text(json.dumps(small))
    one, two = (run_ranks(size, asked.work, path) for size in (1, 2))
    times = [json.loads((out / "times.json").read_text()) for out in (one, two)]
    stats = [fs.read_stats(out / "stats.safetensors")[0] for out in (one, two)]
    worst = _distance(*stats)
    plans = [fs.read_plan(out / "plan.json").kept for out in (one, two)]
    same = all(plans[0][site].equal(kept) for site, kept in plans[1].items())
    middle = [statistics.median(t) for t in times]
    spread = [f"{m:.2f} s ({min(t):.2f} to {max(t):.2f})" for m, t in zip(middle, times, strict=True)]
    tokens = asked.windows * asked.length
    return [
        "",
        "## Two processes against one",
        "",
        f"Calibration with gradients on {tokens:,} tokens (hidden size {small['hidden']}, {small['layers']} layers, "
        f"float64, resident; gloo, one thread each), median of {len(times[0])} (least to most).",
        "",
        "| one process | two processes | speed-up | largest difference of a statistic, of its largest value | plans |",
        "|---|---|---|---|---|",
        f"| {spread[0]} | {spread[1]} | {middle[0] / middle[1]:.2f} | {worst:.1e} | {'equal' if same else 'DIFFER'} |",
    ]


def _distance(one: dict[Any, Any], other: dict[Any, Any]) -> float:
    """Largest difference of any statistic, as a share of its largest value."""
    worst = 0.0
    for site, first in one.items():
        for name, value in first.values.items():
            found = other[site].values[name]
            scale = float(value.double().abs().max()) or 1.0
            worst = max(worst, float((value.double() - found.double()).abs().max()) / scale)
    return worst


def faults() -> list[str]:
    """The table of faults, under a heading of this page."""
    return ["", f"#{FAULTS.read_text(encoding='utf-8').strip()}"]


def table(asked: argparse.Namespace, told: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    """The stages as Markdown."""
    weights, limit = found["make"]["weights"], asked.limit_gigabytes * GB
    idle = found["idle"]
    shown = [stage for stage in STAGES[2:] if stage in found]
    loads = any("load" in found[stage] for stage in shown)
    lines = [
        "# A model larger than memory",
        "",
        f"Random Llama: hidden size {told['hidden']}, {told['layers']} layers, vocabulary {told['vocabulary']:,}, "
        f"{told['dtype']}, {weights / MIB:,.0f} MiB. {told['windows']} windows of {told['length']} tokens, batches of "
        f"{told['batch']}; hidden states wait: {told['place']}. Device: {told['device']}, {platform.machine()}, "
        f"{os.cpu_count()} cores.",
        "",
        f"Limit of peak memory (VmHWM, mapped pages of files included): {limit / MIB:,.0f} MiB; "
        f"the weights are {weights / limit:.2f} times that. Libraries alone (a streamed model of no size, with "
        f"gradients) take {idle['VmHWM'] / MIB:,.0f} MiB of it. «Anonymous» is what the process allocated; «mapped» "
        "are pages of files, which the system can drop; each is the most that was sampled.",
        "",
        "The page cache of files that are read and not mapped belongs to no process, and is in none of these numbers.",
        "",
        "The bound is the larger of reading the weights that the stage needs (the quicker of two readings of the same "
        "files, so from the page cache where it holds them) and of its FLOP at the measured speed of a matrix product. "
        "Those of a reconstruction have its factorisations and triangular solves in float64, at the speed of a product "
        "in float64."
        + (" Load: of the machine in the last minute of the stage, which counts itself." if loads else ""),
        "",
        "| stage | VmHWM, MiB | above libraries | anonymous | mapped | time, s | reading | FLOP | time / bound |"
        + " load |" * loads,
        "|---" * (9 + loads) + "|",
    ]
    lines += [_row(stage, found[stage], idle, loads=loads) for stage in shown]
    if "evaluate" in found:
        lines += ["", f"Perplexity of the pruned model: {found['evaluate']['perplexity']:,.1f} (random weights)."]
    return lines


def _row(stage: str, one: dict[str, Any], idle: dict[str, Any], *, loads: bool) -> str:
    bound = max(one["io"], one["flop"])
    memory = [one["VmHWM"], one["VmHWM"] - idle["VmHWM"], one["RssAnon"], one["RssFile"]]
    cells = [f"{value / MIB:,.0f}" for value in memory]
    cells += [f"{one[name]:.1f}" for name in ("seconds", "io", "flop")]
    cells.append(f"{one['seconds'] / bound:.1f}")
    cells += [f"{one['load']:.1f}" if "load" in one else "not noted"] * loads
    return f"| {' | '.join([stage, *cells])} |"


def main() -> None:
    asked = arguments()
    asked.work.mkdir(parents=True, exist_ok=True)
    told = settings(asked)
    path = asked.work / "settings.json"
    wanted = asked.stages.split(",")
    check_settings(path, told, "it")
    if "ranks" in wanted:
        check_settings(asked.work / RANKS, ranks_settings(asked, told), f"{RANKS}, small, ranks1 and ranks2 in it")
    path.write_text(json.dumps(told))
    found: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        record = asked.work / f"{stage}.record.json"
        if stage in wanted:
            found[stage] = run_stage(stage, path, asked.work, asked.limit_gigabytes * GB)
        elif record.exists():
            found[stage] = read_record(stage, record, asked.limit_gigabytes * GB)
    lines = table(asked, told, found) if {"make", "idle"} <= found.keys() else []
    lines += compare_ranks(asked, told) if "ranks" in wanted else []
    lines += faults()
    text = "\n".join([*lines, "", "Written by `benchmarks/scale.py`.", ""])
    if asked.record and {*STAGES[2:], "make", "idle"} <= found.keys() and "ranks" in wanted:
        OUT.write_text(text, encoding="utf-8")
    elif asked.record:
        raise SystemExit(f"{text}\nNot recorded: that takes all stages ({', '.join((*STAGES, 'ranks'))}).")
    print(text)


if __name__ == "__main__":
    main()
