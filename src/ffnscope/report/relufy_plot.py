"""The plot of a training towards exact zeros: perplexity and zeros by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.report.drawing import COLOURS, GREY, INK, PALE, legend, need, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def plot_relufy(rows: Rows, path: Path, title: str = "") -> Path:
    """Save `draw_relufy`; returns ``path``."""
    return save(draw_relufy(rows, title), path)


def draw_relufy(rows: Rows, title: str = "") -> Figure:
    """Draw perplexity (log scale), exact zeros with the range over FFNs, and the weight of the penalty, by step.

    Args:
        rows: of `relufy_`, or of its ``progress.jsonl``.
        title: second line of the heading.
    """
    need(rows, "measurements")
    figure = new_figure(8.6, 3.8, "A ReLU model in training", title)
    line = [row for row in rows if row["stage"] in ("replaced", "training")]
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    shown: dict[str, Any] = {}
    for axes, key, label, colour, scale in (
        (left, "perplexity", "perplexity", COLOURS[0], 1),
        (right, "sparsity", "exact zeros, %", COLOURS[2], 100),
    ):
        steps = [int(row["step"]) for row in line]
        values = [scale * float(row[key]) for row in line]
        shown[label] = axes.plot(steps, values, "o-", color=colour, markersize=3, linewidth=1.2)[0]
        shown |= _ends(axes, rows, key, scale)
        axes.set_xlabel("step", color=INK, size=9)
        axes.set_ylabel(label, color=INK, size=9)
        axes.grid(color=PALE, linewidth=0.5)
        tidy(axes)
    left.set_yscale("log")
    right.set_ylim(0, 100)
    shown["range over FFNs"] = _range(right, line)
    shown |= _weights(right, rows)
    legend(figure, shown)
    return figure


def _ends(axes: Axes, rows: Rows, key: str, scale: int) -> dict[str, Any]:
    """The dense model as a line, the thresholds as a point."""
    found: dict[str, Any] = {}
    for row in rows:
        value = scale * float(row[key])
        if row["stage"] == "dense":
            found["dense model"] = axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        elif row["stage"] == "shifted":
            mark = axes.plot([int(row["step"])], [value], "D", color=COLOURS[1], markersize=5, zorder=4)[0]
            found["with thresholds"] = mark
    return found


def _range(axes: Axes, rows: Rows) -> Any:
    by_site = [[100 * float(share) for share in row["sparsity_by_site"].values()] for row in rows]
    steps = [int(row["step"]) for row in rows]
    return axes.fill_between(steps, [min(v) for v in by_site], [max(v) for v in by_site], color=COLOURS[2], alpha=0.15)


def _weights(axes: Axes, rows: Rows) -> dict[str, Any]:
    """The weight of the penalty on an axis of its own; none where there was no penalty."""
    line = [row for row in rows if row["stage"] == "training"]
    if not any(float(row["l1_weight"]) for row in line):
        return {}
    other = axes.twinx()
    drawn = other.plot(
        [int(row["step"]) for row in line], [float(row["l1_weight"]) for row in line], ":", color=INK, linewidth=1
    )[0]
    other.set_ylabel("weight of the penalty", color=INK, size=9)
    other.set_ylim(bottom=0)
    tidy(other)
    other.spines["right"].set_visible(True)
    return {"weight of the penalty": drawn}
