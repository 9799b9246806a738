"""The table of benchmarks/structured.py: files are joined, and single weights stand apart from channels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scripts import load_script

PATH = Path(__file__).parents[2] / "benchmarks" / "structured_table.py"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="benchmarks are not part of a source distribution")


@pytest.fixture(scope="module")
def table():
    return load_script(PATH)


def cell(row, sparsity, perplexity, seed=0, **more):
    nll = {name: [4 * math.log(perplexity), 6 * math.log(perplexity)] for name in ("in", "out")}
    targets = {"in": 10, "out": 10}
    text = {"texts": "a,b", "documents": {"in": [0, 1], "out": [0, 1]}, "targets": targets}
    return {"row": row, "sparsity": sparsity, "seed": seed, "nll": nll, **text, **more}


def cells_file(path, *cells):
    path.write_text("".join(json.dumps(one) + "\n" for one in cells))
    return path


def test_files_are_joined_and_the_last_of_equal_cells_counts(table, tmp_path):
    first = cells_file(tmp_path / "a.jsonl", cell("dense", 0.0, 10), cell("x", 0.5, 30))
    second = cells_file(tmp_path / "b.jsonl", cell("x", 0.5, 20), cell("x", 0.5, 25, of="FFN weights, 2:4"))

    found = table.read(first, second, tmp_path / "missing.jsonl")

    assert [table.key(one) for one in found] == [
        ("dense", 0.0, 0, "channels"),
        ("x", 0.5, 0, "channels"),
        ("x", 0.5, 0, "FFN weights, 2:4"),
    ]
    assert table.perplexity(found[1], "in") == pytest.approx(20)


def test_single_weights_have_sections_of_their_own(table, tmp_path):
    ours = [cell("dense", 0.0, 10), cell("score", 0.5, 40), cell("default", 0.5, 20)]
    peers = [
        cell("peer: channels", 0.5, 30, of="channels"),
        cell("Wanda", 0.5, 12, of="FFN weights, unstructured"),
        cell("Wanda", 0.5, 15, of="FFN weights, 2:4"),
    ]
    files = cells_file(tmp_path / "a.jsonl", *ours), cells_file(tmp_path / "b.jsonl", *peers)
    out = tmp_path / "table.md"

    table.write(files, out, ("score",), "default")

    _, channels, pattern, anywhere = out.read_text().split("\n## ")
    assert channels.startswith("50% of the channels removed")
    assert "| peer: channels | 1 | 30.00 | 0.792 |" in channels and "Wanda" not in channels
    assert pattern.startswith("Not channel pruning: 50% of the FFN weights, 2:4")
    assert "| Wanda | 1 | 15.00 | 15.00 |" in pattern
    assert anywhere.startswith("Not channel pruning: 50% of the FFN weights, unstructured")
    assert "| Wanda | 1 | 12.00 | 12.00 |" in anywhere and "default" not in anywhere


def test_shares_and_differences_are_of_the_seeds_that_both_rows_have(table, tmp_path):
    cells = [cell("dense", 0.0, 10), cell("score", 0.5, 40), cell("default", 0.5, 20)]
    cells += [cell("default", 0.5, 39, seed=1), cell("weights", 0.5, 40, any_seed=True)]

    table.write([cells_file(tmp_path / "a.jsonl", *cells)], tmp_path / "table.md", ("score",), "default")

    lines = (tmp_path / "table.md").read_text().splitlines()
    of = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    assert "| 2 | 27.93 | 0.500 |" in of["| **default**"]
    assert "| +0.693 ± " in of["| score"]
    assert f"| {math.log(40 / (20 * 39) ** 0.5):+.3f} ± " in of["| weights"]
    assert "The default, seed by seed: 20.00 / 20.00; 39.00 / 39.00." in lines


def test_cells_of_several_texts_are_refused(table, tmp_path):
    cells = cell("dense", 0.0, 10), cell("default", 0.5, 20, texts="other")

    with pytest.raises(ValueError, match="several evaluation texts"):
        table.write([cells_file(tmp_path / "a.jsonl", *cells)], tmp_path / "table.md", (), "default")
