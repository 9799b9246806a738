"""Plots of contextual sparsity: perplexity against density and bytes, and measures by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ffnscope.errors import UsageError
from ffnscope.report.drawing import (
    COLOURS,
    DARK_ON_CELL,
    GREY,
    INK,
    PALE,
    PALE_ON_CELL,
    STYLES,
    legend,
    need,
    new_figure,
    save,
    tidy,
)
from ffnscope.sparse.evaluation import DENSE, FormRow
from ffnscope.sparse.site_measures import SITE_MEASURES, SiteMeasures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["density", "bytes_share"]
AXES: dict[Cost, str] = {
    "density": "density: channels kept per token, %",
    "bytes_share": "bytes that FFNs read per token, predictor included, % of dense",
}
HIGHEST = 20.0
"""Perplexity over dense at which the axis ends; what is above is drawn at its edge."""
DETAILED = 16  # layers up to which cells hold their numbers


def plot_quality(lines: Mapping[str, Sequence[FormRow]], cost: Cost, path: Path, title: str = "") -> Path:
    """Save `draw_quality`; returns ``path``."""
    return save(draw_quality(lines, cost, title), path)


def plot_sites(rows: Mapping[str, Sequence[SiteMeasures]], measure: str, path: Path, title: str = "") -> Path:
    """Save `draw_sites`; returns ``path``."""
    return save(draw_sites(rows, measure, title), path)


def draw_quality(lines: Mapping[str, Sequence[FormRow]], cost: Cost, title: str = "") -> Figure:
    """Draw perplexity over that of the dense model against what a token costs: a line per label, 95 % intervals.

    Forms without a density are left out where that is the cost. Values above `HIGHEST` are open marks at the edge.

    Args:
        lines: label -> rows at several costs, on one text; a line per label.
        cost: "density", or "bytes_share".
        title: second line of the heading.

    Raises:
        UsageError: nothing to draw, or an unknown cost.
    """
    if cost not in AXES:
        raise UsageError(f"cost must be 'density' or 'bytes_share'; got {cost!r}.")
    shown_lines = {label: _points(rows, cost) for label, rows in lines.items()}
    shown_lines = {label: points for label, points in shown_lines.items() if points}
    need(shown_lines, "rows with this cost")
    figure = new_figure(7.2, 4.4, "Perplexity over dense, against what a token costs", title)
    axes = figure.add_subplot()
    shown: dict[str, Any] = {DENSE: axes.axhline(1.0, color=INK, linewidth=1, linestyle="--")}
    for index, (label, points) in enumerate(shown_lines.items()):
        shown[label] = _line(axes, points, index)
    _quality_axes(axes, cost, [point for points in shown_lines.values() for point in points])
    legend(figure, shown)
    return figure


def draw_sites(rows: Mapping[str, Sequence[SiteMeasures]], measure: str, title: str = "") -> Figure:
    """Draw a measure by layer as a heat map: a row per label, layers across.

    FFNs of one layer (experts) are averaged by their tokens. Grey: no token reached the layer.

    Args:
        rows: label -> measures of FFNs.
        measure: of `SITE_MEASURES`.
        title: second line of the heading.

    Raises:
        UsageError: nothing to draw, or an unknown measure.
    """
    import numpy as np

    if measure not in SITE_MEASURES:
        raise UsageError(f"measure must be one of {', '.join(SITE_MEASURES)}; got {measure!r}.")
    need(any(rows.values()), "measures of FFNs")
    layers = sorted({one.site.layer for found in rows.values() for one in found})
    cells = np.array([[_of_layer(found, layer, measure) for layer in layers] for found in rows.values()])
    width = min(max(4.6 + 0.2 * len(layers), 6.4), 14.0)
    figure = new_figure(width, 1.5 + 0.28 * len(rows), f"{measure.replace('_', ' ').capitalize()} by layer", title)
    axes = figure.add_subplot()
    axes.set_facecolor(PALE)
    image = axes.imshow(cells, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
    step = max(1, math.ceil(len(layers) / 20))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer", color=INK, size=9)
    if len(layers) <= DETAILED:
        _numbers(axes, cells)
    tidy(axes)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=12)
    bar.ax.tick_params(labelsize=8, colors=INK)
    return figure


Point = tuple[float, float, float, float]
"""Cost in %, and value, lower and upper end of perplexity over dense."""


def _points(rows: Sequence[FormRow], cost: Cost) -> list[Point]:
    found: list[Point] = []
    for row in rows:
        at = row.density if cost == "density" else row.bytes_share
        if at is None or row.difference is None:
            continue
        one = row.difference
        ends = (one.value if end is None else end for end in (one.low, one.high))
        value, low, high = (math.exp(min(x, 700.0)) for x in (one.value, *ends))
        found.append((100 * at, value, low, high))
    return sorted(found)


def _line(axes: Axes, points: Sequence[Point], index: int) -> Any:
    marker, style = STYLES[index // len(COLOURS) % len(STYLES)]
    colour = COLOURS[index % len(COLOURS)]
    inside = [(at, value, low, min(high, HIGHEST)) for at, value, low, high in points if value <= HIGHEST]
    at = [point[0] for point in points]
    line = axes.plot(
        at, [min(p[1], HIGHEST) for p in points], style, marker=marker, color=colour, linewidth=1.1, markersize=4
    )[0]
    axes.vlines([p[0] for p in inside], [p[2] for p in inside], [p[3] for p in inside], color=colour, linewidth=1)
    above = [point[0] for point in points if point[1] > HIGHEST]
    look: Any = {"markerfacecolor": "white", "color": colour, "markersize": 6, "clip_on": False}
    axes.plot(above, [HIGHEST] * len(above), "^", **look, zorder=4)
    return line


def _quality_axes(axes: Axes, cost: Cost, points: Sequence[Point]) -> None:
    highest = min(max(point[1] for point in points), HIGHEST)
    axes.set_yscale("log")
    marks = [1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20]
    lowest = min(0.99, *(point[2] for point in points))
    kept = [mark for mark in marks if mark <= highest * 1.15]
    if highest > 3:
        kept = [mark for mark in kept if mark not in (1.02, 1.05)]
    axes.set_ylim(lowest, max(highest * 1.03, 1.02))
    axes.set_yticks(kept, [f"{mark:g}x" for mark in kept])
    axes.minorticks_off()
    axes.set_xlabel(AXES[cost], color=INK, size=9)
    axes.set_ylabel("perplexity over dense", color=INK, size=9)
    axes.grid(color=PALE, linewidth=0.5)
    axes.tick_params(colors=GREY)
    tidy(axes)


def _of_layer(found: Sequence[SiteMeasures], layer: int, measure: str) -> float:
    of = [(one.n_tokens, one.values[measure].summary.mean) for one in found if one.site.layer == layer]
    total = sum(n for n, _ in of)
    return sum(n * value for n, value in of) / total if total else math.nan


def _numbers(axes: Axes, cells: Any) -> None:
    import numpy as np

    low, high = np.nanmin(cells), np.nanmax(cells)
    for (row, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            bright = value > low + 0.6 * (high - low)
            colour = DARK_ON_CELL if bright else PALE_ON_CELL
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=7, color=colour)
