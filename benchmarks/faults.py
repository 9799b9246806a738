"""Faults at random points of runs, sweeps and the commands that go on after an interrupt, as a table.

The checkpoint is tiny. The streamed run has its hidden states on disk, a sequential reconstruction, and checkpoints.
The run of two processes is streamed, and one of them is killed at a random file operation of its own.
Every fault is followed by the same call again; the results are compared with those of an unbroken run byte for byte.
A fault that would end in other results, or in an error that does not name the file and what to do, stops the script.
A kill that comes when all is done, and a full disk that only the log would meet, are tried again, not counted.
Small file systems need the right to mount one; without it they are left out, and the table says so.
Not among them: `curves`, `rank --validate`, several machines, and damage to the checkpoint that is read.
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


COMMANDS = {
    **{"run": 4, "prune": 4, "streamed run": 2, "score": 3, "sweep": 2, "run of 2 processes": 3},
    **{"sparsify": 1, "answer": 1, "place": 2, "relufy": 1},
}
"""Work -> how often each kind of fault is made."""
Table = dict[tuple[str, str, str], int]


def table(command: str, seed: int, kills: int, disk: bool) -> Table:
    """(command, fault, outcome) -> how often."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_documents, write_texts
    from injection import all_faults
    from injection_ranks import SharedRun, all_shared_faults
    from injection_work import Work

    shared, times = command == "run of 2 processes", COMMANDS[command]
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        texts.mkdir()
        write_documents(texts)
        work = (SharedRun if shared else Work)(command, Path(folder) / "root")
        work.prepare(write_texts(texts))
        if shared:
            return all_shared_faults(work, seed, kills=kills, times=times).table
        return all_faults(work, seed, kills=kills, times=times, disk=disk).table


def mounts() -> bool:
    """Whether small file systems can be made."""
    sys.path.insert(0, str(ROOT / "tests"))
    from injection_files import can_mount

    with tempfile.TemporaryDirectory() as folder:
        return can_mount(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5, help="processes killed per command")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="those to make faults of, by commas")
    parser.add_argument("--workers", type=int, default=2, help="commands at a time")
    parser.add_argument("--out", type=Path, default=OUT, help="the table")
    asked = parser.parse_args()
    disk, names = mounts(), asked.commands.split(",")
    rows: Table = {}
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        given = [pool.submit(table, name, asked.seed, asked.kills, disk) for name in names]
        for made in given:
            rows |= made.result()
    text = "\n".join(written(rows, asked.seed, disk=disk))
    asked.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def written(rows: Table, seed: int, *, disk: bool) -> list[str]:
    """The table as Markdown."""
    without = "" if disk else " This process may not mount file systems, so none was full but by a limit on files."
    return [
        "# Faults at random points",
        "",
        f"{sum(rows.values())} faults, seed {seed}; after each, the next call gave the files of an unbroken",
        f"one, byte for byte.{without} Written by `benchmarks/faults.py`.",
        "",
        "| command | fault | what the next call did | times |",
        "|---|---|---|---|",
        *(f"| {c} | {f} | {o} | {n} |" for (c, f, o), n in rows.items()),
    ]


if __name__ == "__main__":
    main()
