"""CPU time of the checksum of written tensors (random bytes here): CRC-32, hashes of hashlib, and threads."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OUT = Path(__file__).parent / "results" / "checksum.txt"
REPEATS = 5


def per_gigabyte(work: Callable[[], object], n_bytes: int) -> float:
    """Least CPU seconds per 10^9 bytes, of all threads together."""
    found = []
    for _ in range(REPEATS):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found) / n_bytes * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=4)
    parser.add_argument("--mib", type=int, default=8, help="size of each tensor")
    asked = parser.parse_args()
    made = [os.urandom(asked.mib << 20) for _ in range(asked.tensors)]

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
    lines = [f"{asked.tensors} tensors of {asked.mib} MiB; least of {REPEATS}, CPU seconds per GB"]
    for name, work in rows.items():
        lines.append(f"{name:20} {per_gigabyte(work, asked.tensors * asked.mib << 20):6.2f}")
    text = "\n".join(lines)
    OUT.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
