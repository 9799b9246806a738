import hashlib
import itertools
import json
import lzma
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from ffnscope.calibrate import corpora
from ffnscope.calibrate.corpora import SPLITS, corpus, corpus_names, describe_corpus
from ffnscope.errors import TextError, UnknownNameError

SHIPPED = files("ffnscope") / "corpora"


@pytest.fixture(scope="module")
def rows():
    lines = lzma.decompress((SHIPPED / "sotu.jsonl.xz").read_bytes()).decode().split("\n")
    return [json.loads(line) for line in lines if line]


def test_names():
    assert corpus_names() == ["sotu", "pydoc_topics", "stdlib_source"]


@pytest.mark.parametrize("name", corpus_names())
def test_splits_are_disjoint_nonempty_and_repeatable(name):
    splits = {split: corpus(name, split) for split in SPLITS}
    names = [document for split in splits.values() for document, _ in split]
    assert len(names) == len(set(names))
    assert all(text.strip() for split in splits.values() for _, text in split)
    assert len({text for split in splits.values() for _, text in split}) == len(names)
    sizes = {split: sum(len(text) for _, text in part) for split, part in splits.items()}
    assert all(size >= 0.2 * sum(sizes.values()) for size in sizes.values())
    assert corpus(name, "validation") == splits["validation"]


def test_sotu_splits_are_spread_over_time(rows):
    for split in SPLITS:
        years = [row["year"] for row in rows if row["split"] == split]
        assert years == sorted(years)
        assert years[0] <= 1792 and years[-1] >= 2019
        assert max(b - a for a, b in itertools.pairwise(years)) <= 20


def test_sotu_no_split_repeats_another(rows):
    def sequences(split):
        for row in rows:
            words = row["text"].split()
            if row["split"] == split:
                yield row["id"], set(zip(*(words[i:] for i in range(12)), strict=False))

    seen = set().union(*(found for _, found in sequences("train")))
    assert all(len(found & seen) < 200 for _, found in sequences("test"))


def test_sotu_file_is_what_its_readme_says(rows):
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    packed = (SHIPPED / "sotu.jsonl.xz").read_bytes()
    assert len(packed) < 2_000_000
    assert hashlib.sha256(lzma.decompress(packed)).hexdigest() in readme
    assert f"{len(rows)} whole addresses" in readme
    for split in SPLITS:
        part = [row for row in rows if row["split"] == split]
        size = sum(len(row["text"]) for row in part)
        assert re.search(rf"\| {split} \| {len(part)} \| {size:,} \|", readme)


@pytest.mark.parametrize("name", ["pydoc_topics", "stdlib_source"])
def test_no_document_stands_in_another_split(name):
    def lines(text):
        return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]

    splits = {split: corpus(name, split) for split in SPLITS}
    for split, documents in splits.items():
        elsewhere = {x for other in SPLITS if other != split for _, text in splits[other] for x in lines(text)}
        shares = [sum(x in elsewhere for x in lines(text)) / len(lines(text)) for _, text in documents]
        assert sum(shares) / len(shares) < 0.05


def test_stdlib_source_has_no_tests_and_no_other_corpus():
    names = [name for split in SPLITS for name, _ in corpus("stdlib_source", split)]
    assert not [n for n in names if {"test", "tests", "site-packages", "idlelib", "pydoc_data"} & set(n.split("/"))]
    assert "json/decoder.py" in names
    assert all(1_000 <= len(text.encode()) <= 40_000 for _, text in corpus("stdlib_source", "test"))


def test_unknown_corpus_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Unknown shipped corpus 'stou'\. Did you mean 'sotu'"):
        corpus("stou")


def test_unknown_split_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Unknown split of sotu 'valid'\. Did you mean 'validation'"):
        corpus("sotu", "valid")


def test_python_without_the_text(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match="pydoc_topics: this Python installation holds none"):
        corpus("pydoc_topics")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(TextError, match="stdlib_source"):
        corpus("stdlib_source")


def test_description_names_the_python_version():
    version = ".".join(map(str, sys.version_info[:3]))
    assert describe_corpus("sotu") == "sotu"
    assert describe_corpus("pydoc_topics").startswith(f"pydoc_topics (Python {version}")


def test_build_script_is_deterministic(tmp_path):
    script = Path(__file__).parents[3] / "tools" / "build_corpus.py"
    package = tmp_path / "package" / "data"
    package.mkdir(parents=True)
    for year in range(1800, 1830):
        text = f"\x02 year {year} " + " ".join(f"w{year}x{i}" for i in range(400))
        row = {"year": year, "name": "A B", "party": "d", "text": text}
        (package / f"{year}_a_b_d.json").write_text(json.dumps(row), encoding="utf-8")
    again = json.loads((package / "1800_a_b_d.json").read_text())
    (package / "1830_a_b_d.json").write_text(json.dumps(again | {"year": 1830}), encoding="utf-8")
    (package / "1831_a_b_d.json").write_text(json.dumps(again | {"text": "long " * 30_000}), encoding="utf-8")
    copy = tmp_path / "tools" / "build_corpus.py"
    copy.parent.mkdir()
    copy.write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    target = tmp_path / "src" / "ffnscope" / "corpora" / "sotu.jsonl.xz"

    def build():
        subprocess.run([sys.executable, str(copy), str(package.parent)], check=True, capture_output=True)
        return target.read_bytes()

    first = build()
    assert build() == first
    built = [json.loads(line) for line in lzma.decompress(first).decode().split("\n") if line]
    assert [row["year"] for row in built] == list(range(1800, 1830))
    assert all(row["text"].startswith("year ") for row in built)
    assert {split: sum(row["split"] == split for row in built) for split in SPLITS} == {
        "train": 16,
        "validation": 7,
        "test": 7,
    }
