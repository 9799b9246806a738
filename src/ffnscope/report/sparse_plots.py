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
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.evaluation import FormRow
from ffnscope.sparse.site_measures import SITE_MEASURES, SiteMeasures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["density", "bytes_share"]
AXES: dict[Cost, str] = {
    "density": "density: channels kept per token, %",
    "bytes_share": f"bytes that FFNs read per token, predictor included, % of dense ({UNIT})",
}
MARKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300, 1000, 2000)
"""Rise of the perplexity, in %, at which the axis has a tick and may end; 0 is dense, from -1 to 1 it is linear."""
LOWEST, HIGHEST = MARKS[0], MARKS[-1]
"""What is beyond is an open mark at the edge of the axis."""
DETAILED = 16  # layers up to which cells hold their numbers


def plot_quality(lines: Mapping[str, Sequence[FormRow]], cost: Cost, path: Path, title: str = "") -> Path:
    """Save `draw_quality`; returns ``path``."""
    return save(draw_quality(lines, cost, title), path)


def plot_sites(rows: Mapping[str, Sequence[SiteMeasures]], measure: str, path: Path, title: str = "") -> Path:
    """Save `draw_sites`; returns ``path``."""
    return save(draw_sites(rows, measure, title), path)


def draw_quality(lines: Mapping[str, Sequence[FormRow]], cost: Cost, title: str = "") -> Figure:
    """Draw the rise of the perplexity over dense against what a token costs: a line per label, 95 % intervals.

    The axis is logarithmic but for its middle (see `MARKS`), and as long as the points and their intervals need. Forms
    without a density are left out where that is the cost.

    Args:
        lines: label -> rows at several costs, on one text; a line per label.
        cost: "density", or "bytes_share".
        title: second line of the heading.

    Raises:
        UsageError: nothing to draw, or an unknown cost.
    """
    if cost not in AXES:
        raise UsageError(f"cost must be 'density' or 'bytes_share'; got {cost!r}.")
    points = {label: _points(rows, cost) for label, rows in lines.items()}
    need(any(points.values()), "rows with this cost")
    figure = new_figure(7.2, 4.4, "Rise of the perplexity over dense, against what a token costs", title)
    axes = figure.add_subplot()
    _quality_axes(axes, cost, [value for found in points.values() for point in found for value in point[1:]])
    shown = {label: _line(axes, found, index) for index, (label, found) in enumerate(points.items()) if found}
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
    if measure not in SITE_MEASURES:
        raise UsageError(f"measure must be one of {', '.join(SITE_MEASURES)}; got {measure!r}.")
    need(any(rows.values()), "measures of FFNs")
    layers = sorted({one.site.layer for found in rows.values() for one in found})
    cells = {label: [_of_layer(found, layer, measure) for layer in layers] for label, found in rows.items()}
    return draw_cells(cells, layers, f"{measure.replace('_', ' ').capitalize()} by layer", title)


def draw_cells(rows: Mapping[str, Sequence[float]], layers: Sequence[int], heading: str, title: str = "") -> Figure:
    """Draw a heat map: a row per label, layers across; NaN is grey."""
    import numpy as np

    cells = np.array(list(rows.values()))
    width = min(max(4.6 + 0.2 * len(layers), 6.4), 14.0)
    figure = new_figure(width, 1.5 + 0.28 * len(rows), heading, title)
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
"""Cost in %, and value, lower and upper end of the rise of the perplexity in %."""


def _points(rows: Sequence[FormRow], cost: Cost) -> list[Point]:
    found: list[Point] = []
    for row in rows:
        at = row.density if cost == "density" else row.bytes_share
        if at is None or row.difference is None:
            continue
        one = row.difference
        ends = (one.value if end is None else end for end in (one.low, one.high))
        value, low, high = (100 * math.expm1(min(x, 600.0)) for x in (one.value, *ends))
        found.append((100 * at, value, low, high))
    return sorted(found)


def _line(axes: Axes, points: Sequence[Point], index: int) -> Any:
    marker, style = STYLES[index // len(COLOURS) % len(STYLES)]
    colour = COLOURS[index % len(COLOURS)]
    at, drawn = [point[0] for point in points], [_within(point[1]) for point in points]
    line = axes.plot(at, drawn, style, marker=marker, color=colour, linewidth=1.1, markersize=4, clip_on=False)[0]
    axes.vlines(at, [_within(p[2]) for p in points], [_within(p[3]) for p in points], color=colour, linewidth=1)
    above, below = ([p[0] for p in points if p[1] > HIGHEST], [p[0] for p in points if p[1] < LOWEST])
    for edge, shape, beyond in ((HIGHEST, "^", above), (LOWEST, "v", below)):
        if beyond:
            look: Any = {"markerfacecolor": "white", "color": colour, "markersize": 6, "linestyle": "none"}
            axes.plot(beyond, [edge] * len(beyond), shape, **look, clip_on=False, zorder=4)
    return line


def _within(value: float) -> float:
    return min(max(value, LOWEST), HIGHEST)


def _quality_axes(axes: Axes, cost: Cost, values: Sequence[float]) -> None:
    low = max((mark for mark in MARKS if mark <= min(0, *values)), default=LOWEST)
    high = min((mark for mark in MARKS if mark >= max(1, *values)), default=HIGHEST)
    axes.set_yscale("symlog", linthresh=1, linscale=0.5)
    axes.set_ylim(low, high)
    marks = [mark for mark in MARKS if low <= mark <= high]
    axes.set_yticks(marks, [f"{mark:g} %" for mark in marks])
    axes.minorticks_off()
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xlabel(AXES[cost], color=INK, size=9)
    axes.set_ylabel("rise of the perplexity", color=INK, size=9)
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
