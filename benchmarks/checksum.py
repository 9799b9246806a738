"""CPU time of the checksum of written tensors: CRC-32 against the hashes of hashlib, and against threads."""

from __future__ import annotations

import argparse
import hashlib
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

OUT = Path(__file__).parent / "results" / "checksum.txt"
REPEATS = 5


def per_gigabyte(work: Callable[[], object], n_bytes: int) -> tuple[float, float]:
    """Least CPU and wall seconds per 10^9 bytes."""
    found = []
    for _ in range(REPEATS):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(c for c, _ in found) / n_bytes * 1e9, min(w for _, w in found) / n_bytes * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--mib", type=int, default=8, help="size of each tensor")
    asked = parser.parse_args()
    made = [torch.randint(0, 256, (asked.mib << 20,), dtype=torch.uint8).numpy().data for _ in range(asked.tensors)]

    def hashed(name: str) -> Callable[[], object]:
        def work() -> None:
            digest = hashlib.new(name)
            for one in made:
                digest.update(one)

        return work

    def threaded() -> object:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda one: hashlib.blake2b(one).digest(), made))

    def crc() -> None:
        found = 0
        for one in made:
            found = zlib.crc32(one, found)

    rows: dict[str, Callable[[], object]] = {
        "crc32 (used)": crc,
        "sha256": hashed("sha256"),
        "blake2b": hashed("blake2b"),
        "blake2b, 2 threads": threaded,
    }
    lines = [f"{asked.tensors} tensors of {asked.mib} MiB; least of {REPEATS}, seconds per GB: CPU, wall"]
    for name, work in rows.items():
        cpu, wall = per_gigabyte(work, asked.tensors * asked.mib << 20)
        lines.append(f"{name:20} {cpu:6.2f} {wall:6.2f}")
    text = "\n".join(lines)
    OUT.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
