"""Faults at random points of `ffnscope run`, also on a streamed model, and `ffnscope prune`, as a table.

The checkpoint is tiny. The streamed run has its hidden states on disk, a sequential reconstruction, and checkpoints.
Every fault is followed by the same call again; the results are compared with those of an unbroken run byte for byte.
A fault that would end in other results, or in an error that does not name the file and what to do, stops the script.
A kill that comes when all is done, and a full disk that only the log would meet, are tried again, not counted.
Not among them: other commands, sweeps, several processes, and damage to the checkpoint that is read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "faults.md"


COMMANDS = {"run": 4, "prune": 4, "streamed run": 2}
"""Work -> how often each kind of fault is made."""


def table(command: str, seed: int, kills: int) -> dict[tuple[str, str, str], int]:
    """(command, fault, outcome) -> how often."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_texts
    from injection import Work, all_faults

    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        texts.mkdir()
        work = Work(command, Path(folder) / "root")
        work.prepare(write_texts(texts))
        return all_faults(work, seed, kills=kills, times=COMMANDS[command]).table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5, help="processes killed per command")
    asked = parser.parse_args()
    rows: dict[tuple[str, str, str], int] = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for made in [pool.submit(table, command, asked.seed, asked.kills) for command in COMMANDS]:
            rows |= made.result()
    lines = [f"| {c} | {f} | {o} | {n} |" for (c, f, o), n in rows.items()]
    text = "\n".join(
        [
            "# Faults at random points",
            "",
            f"{sum(rows.values())} faults, seed {asked.seed}; after each, the next call gave the files of an unbroken",
            "one, byte for byte. Written by `benchmarks/faults.py`.",
            "",
            "| command | fault | what the next call did | times |",
            "|---|---|---|---|",
            *lines,
        ]
    )
    OUT.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
