"""The plot of a training: every row is drawn."""

from __future__ import annotations

import pytest

from ffnscope.errors import UsageError

pytest.importorskip("matplotlib")

from ffnscope.report.relufy_plot import draw_relufy


def row(stage, step, perplexity, sparsity, **more):
    return {
        "stage": stage,
        "step": step,
        "perplexity": perplexity,
        "sparsity": sparsity,
        "sparsity_by_site": {"a": sparsity - 0.1, "b": sparsity + 0.1},
        **more,
    }


ROWS = [
    row("dense", 0, 20.0, 0.0),
    row("replaced", 0, 900.0, 0.5),
    row("training", 10, 40.0, 0.6, l1_weight=0.1),
    row("training", 20, 30.0, 0.7, l1_weight=0.2),
    row("trained", 20, 30.0, 0.7),
    row("shifted", 20, 30.1, 0.8),
]


def test_lines_are_the_rows():
    left, right, weights = draw_relufy(ROWS, "tiny").axes
    assert list(left.lines[0].get_ydata()) == [900, 40, 30] and list(left.lines[0].get_xdata()) == [0, 10, 20]
    assert list(right.lines[0].get_ydata()) == pytest.approx([50, 60, 70])
    assert [line.get_ydata()[0] for line in left.lines[1:]] == [20, 30.1]
    assert list(weights.lines[0].get_ydata()) == [0.1, 0.2]


def test_without_penalty_and_thresholds():
    rows = [{**one, **({"l1_weight": 0.0} if "l1_weight" in one else {})} for one in ROWS[:-1]]
    assert len(draw_relufy(rows).axes) == 2


def test_nothing_to_plot():
    with pytest.raises(UsageError, match="nothing to plot"):
        draw_relufy([])
