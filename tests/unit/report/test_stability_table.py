"""The table of agreements: intervals, and what their notes say."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from ffnscope.analyze.repeat_passes import Method
from ffnscope.report.stability_table import NOTES, print_stability, stability_markdown


def row(method: str = "jackknife", **changes: Any) -> dict[str, Any]:
    return {
        **{"metric": "wanda", "first": "a [red]", "second": "b|c", "documents_first": 3, "documents_second": 4},
        **{"spearman": 0.98765, "spearman_low": 0.9, "spearman_high": 1.0},
        **{"top1_jaccard": 0.5, "top1_jaccard_low": None, "top1_jaccard_high": None},
        "interval_method": method,
        **changes,
    }


def printed(rows: list[dict[str, Any]]) -> str:
    console = Console(width=140, file=io.StringIO(), color_system=None)
    print_stability(rows, console)
    return console.file.getvalue()


def test_in_the_terminal() -> None:
    text = printed([row(), row(spearman=None, spearman_low=None)])
    assert "0.988 (0.900 to 1.000)" in text
    assert "a [red]" in text
    assert "–" in text
    assert "0.500 (" not in text
    assert text.count("In brackets: 95 % intervals over documents") == 1


def test_in_markdown() -> None:
    assert stability_markdown([row("jackknife, fixed core"), row("no text", metric="random")]) == (
        "| metric | calibration | with | Spearman | top 1 % Jaccard |\n"
        "| --- | --- | --- | ---: | ---: |\n"
        "| wanda* | a [red] | b\\|c | 0.988 (0.900 to 1.000) | 0.500 |\n"
        "| random | a [red] | b\\|c | 0.988 | 0.500 |\n\n"
        "In brackets: 95 % intervals over documents, from leaving out groups of them (jackknife).\n\n"
        "\\* Groups are left out with the supernode core of the whole text.\n\n"
        "No brackets: the metric reads no text, so it does not depend on the documents.\n"
    )


@pytest.mark.parametrize("method", Method.__args__)  # type: ignore[attr-defined]
def test_every_method_has_its_note_and_no_other(method: str) -> None:
    text = printed([row(method)])
    assert NOTES[method] in text
    others = set(NOTES) - {method, "jackknife"}
    assert not any(NOTES[name] in text for name in others)
    assert ("In brackets" in text) == method.startswith("jackknife")
