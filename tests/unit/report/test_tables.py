from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from ffnscope.errors import UsageError
from ffnscope.io import read_json, write_csv, write_json
from ffnscope.report.tables import (
    Cell,
    Grid,
    number,
    panels,
    percent,
    print_grid,
    print_results,
    results_markdown,
    results_rows,
)


def printed(rows, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_results(rows, console)
    return console.file.getvalue()


def test_flat_rows(rows, tmp_path):
    flat = results_rows(rows)
    assert [f["label"] for f in flat] == [r.label for r in rows]
    assert flat[2] == {
        "label": "wanda 0.2",
        "metric": "wanda",
        "dataset": "speeches",
        "sparsity_asked": 0.2,
        "sparsity": 0.2,
        "perplexity": 12.34,
        "perplexity_stderr": 0.05,
        "kl_to_dense": pytest.approx(0.2103, abs=1e-4),
        "kl_to_dense_stderr": 0.01,
        "top1_agreement": pytest.approx(0.8104, abs=1e-4),
        "top1_agreement_stderr": 0.002,
        "n_tokens": 65472,
        "protocol": "non-overlapping blocks of 1024 tokens",
    }
    assert flat[0]["metric"] is None and flat[0]["kl_to_dense"] is None and flat[0]["top1_agreement_stderr"] is None
    write_json(tmp_path / "results.json", flat)
    assert read_json(tmp_path / "results.json") == flat
    write_csv(tmp_path / "results.csv", flat)
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert lines[0]["kl_to_dense"] == "" and float(lines[3]["perplexity"]) == 1.25e7


def test_markdown(rows):
    assert results_markdown(rows) == (
        "### Perplexity on speeches, by sparsity\n"
        "\n"
        "| metric | 0 % | 20 % | 50 % |\n"
        "|---|---:|---:|---:|\n"
        "| dense | 10.00 ± 0.05 | – | – |\n"
        "| wanda | – | **12.34 ± 0.05** | **100.0 ± 1.5** |\n"
        "| random (floor) | – | 40.00 ± 0.05 | 1.25e+07 ± 2.5e+05 |\n"
        "\n"
        "Protocol: non-overlapping blocks of 1024 tokens; 65,472 tokens.  Bold: lowest of its column.  "
        "random is the floor: a metric that does no better has found nothing.\n"
        "\n"
        "### KL to the dense model (nats/token) / top-1 agreement on speeches, by sparsity\n"
        "\n"
        "| metric | 20 % | 50 % |\n"
        "|---|---:|---:|\n"
        "| wanda | 0.210 / 81.0 % | 2.303 / 10.0 % |\n"
        "| random (floor) | 1.386 / 25.0 % | 14.04 / 0.0 % |\n"
        "\n"
        "Protocol: non-overlapping blocks of 1024 tokens; 65,472 tokens.\n"
    )


def test_every_dataset_has_its_tables(row):
    rows = [row(None, 0.0, 10.0), row(None, 0.0, 20.0, dataset="code"), row("wanda", 0.2, 30.0, dataset="code")]
    assert [panel.dataset for panel in panels(rows)] == ["speeches", "code"]
    text = results_markdown(rows)
    assert text.count("### Perplexity on ") == 2
    assert text.count("### KL to ") == 1
    assert "floor" not in text and "**" not in text


def test_rows_of_one_metric_at_one_sparsity_go_by_their_labels(row):
    rows = [row("wanda", 0.2, 11.0, label="wanda local"), row("wanda", 0.2, 12.0, label="wanda global")]
    (panel,) = panels([*rows, row("magnitude", 0.2, 13.0)])
    assert list(panel.lines) == ["wanda local", "wanda global", "magnitude"]
    with pytest.raises(
        UsageError, match=r"two results for 'twice' at sparsity 0\.2 on 'speeches'; give them different"
    ):
        panels([row("wanda", 0.2, 11.0, label="twice"), row("wanda", 0.2, 12.0, label="twice")])


def test_achieved_sparsity_is_told_where_it_differs(row):
    text = results_markdown([row("wanda", 0.2, 11.0, achieved=0.1875), row("magnitude", 0.2, 12.0, achieved=0.2004)])
    assert "Achieved sparsity: 18.75 % instead of 20 % (wanda)." in text
    assert "instead" not in results_markdown([row("magnitude", 0.2, 12.0, achieved=0.2004)])


def test_names_cannot_break_a_markdown_table(row):
    assert r"| a\|b |" in results_markdown([row("a|b", 0.2, 11.0)])


def test_no_rows():
    assert results_rows([]) == []
    assert results_markdown([]) == ""


@pytest.mark.parametrize("width", [50, 120])
def test_terminal_table_holds_every_number(rows, width):
    text = printed(rows, width)
    for expected in ("dense", "random (floor)", "12.34", "± 0.05", "1.25e+07", "± 2.5e+05", "81.0 %"):
        assert expected in text
    assert ("12.34 ± 0.05" in text) == (width == 120)
    assert max(map(len, text.splitlines())) <= width


def test_columns_that_do_not_fit_the_terminal_go_below():
    names = [f"model {i}" for i in range(9)]
    line = [Cell("a task of some length: acc"), *(Cell(f"0.{i}50 ± 0.250") for i in range(9))]
    for width, tables in ((60, 3), (80, 2), (400, 1)):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        print_grid(Grid("Tasks", ["task", *names], [line], ["a note"]), console)
        text = console.file.getvalue()
        assert all(name in text for name in names) and all(f"0.{i}50" in text for i in range(9))
        assert text.count("Tasks") == text.count("a task of some length: acc") == tables
        assert text.count("a note") == 1 and max(map(len, text.splitlines())) <= width


def test_terminal_table_does_not_read_names_as_markup(row):
    assert "[red]metric[/red]" in printed([row("[red]metric[/red]", 0.2, 11.0)], 100)


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (12.3412, 0.0512, "12.34 ± 0.05"),
        (12.3412, 0.0004, "12.34 ± 0.0004"),
        (12.3412, None, "12.34"),
        (0.0, 0.0, "0.000 ± 0"),
        (1.5, 0.25, "1.500 ± 0.250"),
        (123456.7, 89.1, "123,457 ± 89"),
        (1e7, 123456.0, "1.00e+07 ± 1.2e+05"),
        (1e-6, None, "1.00e-06"),
        (-0.25, None, "-0.250"),
    ],
)
def test_numbers(value: float, stderr: float | None, text: str):
    assert number(value, stderr) == text


def test_percent():
    assert [percent(v) for v in (0.2, 0.29, 0.0, 0.1875, 1 / 3)] == ["20 %", "29 %", "0 %", "18.75 %", "33.33 %"]
