"""The plot of loss curves: lines and dots where the numbers are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.io import write_json
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves, read_curves, write_curves
from ffnscope.report.curve_plots import draw_curves, draw_errors, plot_curves
from ffnscope.types import FFNSite, Scores

SITES = [FFNSite(i, f"layers.{i}.mlp", None, "up", "down", 4, 20, expert=None) for i in range(3)]
POINTS = {s: (torch.tensor([5, 10]), torch.tensor([3.0 * (i + 1), 0.001 * (i + 1)])) for i, s in enumerate(SITES)}
CURVES = Curves(POINTS, "nats per token", {"model": "abc", "tokens": 7})
SCORES = Scores("made up", {site: torch.arange(20.0) for site in SITES})


def test_rows() -> None:
    plan = build_plan(SCORES, 0.5, "measured", curves=CURVES)
    rows = CURVES.rows(plan)
    assert [(r["site"], r["width"]) for r in rows[:2]] == [("layers.0.mlp", 5), ("layers.0.mlp", 10)]
    assert rows[0]["chosen"] == plan.widths[SITES[0]]
    expected = float(CURVES.at(SITES[0], torch.tensor([rows[0]["chosen"]])))
    assert rows[0]["chosen_rise"] == expected
    assert all(row["chosen"] is None and row["chosen_rise"] is None for row in CURVES.rows())


def test_files(tmp_path: Path) -> None:
    write_curves(tmp_path / "c.safetensors", CURVES)
    found = read_curves(tmp_path / "c.safetensors")
    assert (found.unit, found.facts) == (CURVES.unit, CURVES.facts)
    assert list(found.points) == SITES
    for site, (widths, rises) in POINTS.items():
        assert torch.equal(found.points[site][0], widths) and torch.equal(found.points[site][1], rises)
    write_json(tmp_path / "other.json", {})
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_curves(tmp_path / "other.json")


def test_lines_and_dots() -> None:
    plan = build_plan(SCORES, 0.5, "measured", curves=CURVES)
    figure = draw_curves(CURVES.rows(plan), "a model")
    left, right = figure.axes
    assert left.get_yscale() == "log"
    lines = [line for line in left.lines if len(line.get_xdata()) > 5]
    assert len(lines) == len(SITES)
    assert lines[0].get_ydata()[0] == pytest.approx(3.0) and lines[2].get_ydata()[0] == pytest.approx(9.0)
    assert min(lines[0].get_ydata()) == pytest.approx(left.get_ylim()[0])
    shares = next(line for line in right.lines if len(line.get_xdata()) == len(SITES))
    assert shares.get_ydata().tolist() == [100 * w / 20 for w in plan.widths.values()]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["first layer", "last layer", "chosen width", "all FFNs"]


def test_one_panel_without_a_choice(tmp_path: Path) -> None:
    assert len(draw_curves(CURVES.rows()).axes) == 1
    assert plot_curves(CURVES.rows(), tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="nothing to plot: got no measured points"):
        draw_curves([])


def test_error_profile() -> None:
    rows = [{"layer": i, "error_without": 0.5 / (i + 1), "error": 0.0 if i == 2 else 0.1} for i in range(3)]
    (axes,) = draw_errors(rows).axes
    before, after = axes.lines
    assert before.get_ydata() == pytest.approx([0.5, 0.25, 0.5 / 3]) and after.get_ydata() == pytest.approx(
        [0.1, 0.1, 1e-8]
    )
    assert axes.get_yscale() == "log"
