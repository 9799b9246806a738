"""Every causal LM of `transformers`, generated from its mapping, against docs/coverage.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from coverage_page import HEAD, _totals, line
from layout_coverage import Row, check
from tiny_all import VARIANTS, architectures

PAGE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text()
NAMES = [*architectures(), *VARIANTS]
same_version = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE, reason="docs/coverage.md was made with another version"
)
# one of each layout: separate, fused, plain, Conv1D, inlined in the layer, split over siblings, parallel, hybrid,
# per-layer widths, several codebooks, reversible layers, dense layers before experts, partly refused, a norm inside,
# blocks that layers share, layers that run several times
SAMPLE = [
    "llama, biases",
    "phi3",
    "opt, projected embedding",
    "gpt2",
    "bart",
    "bert",
    "gpt_neox",
    "bamba",
    "recurrent_gemma",
    "gemma4_text, double width",
    "musicgen",
    "glm4_moe",
    "mllama, cross attention",
    "bitnet",
    "zamba2, two blocks",
    "hrm_text, two cycles",
    "mamba",
]


def assert_row(name: str) -> None:
    row = check(name)
    assert not row.ours, row.why
    if f"transformers {transformers.__version__} " in PAGE:
        assert line(row) in PAGE, f"docs/coverage.md is stale: run tools/write_coverage.py\n{line(row)}"


@pytest.mark.parametrize("name", SAMPLE)
def test_one_of_each_layout(name: str) -> None:
    assert_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    assert_row(name)


@same_version
def test_the_totals_are_those_of_the_lines() -> None:
    """Row by row as the page has it: the lines themselves are held by the tests above."""
    cells = [[c.strip() for c in one.split("|")[1:-1]] for one in PAGE.split(HEAD)[1].splitlines()[2:] if one]
    rows = [_row(one) for one in cells if len(one) == 8]
    assert len(rows) == len(architectures())
    assert set(_totals(rows)) <= set(PAGE.splitlines())


def _row(cells: list[str]) -> Row:
    name, sites, _, found, cut, gradients, reload, _ = cells
    built = "failed" if found == "–" else "ok"
    return Row(name, sites=int(sites), built=built, found=found, cut=cut, gradients=gradients, reload=reload)  # type: ignore[arg-type]


@same_version
def test_the_page_lists_every_architecture_once() -> None:
    tables = PAGE.split(HEAD)[1:]
    assert re.findall(r"^\| ([^|]+?) \| \d", "".join(tables), flags=re.MULTILINE) == NAMES
