"""The plot of measured loss curves: what every FFN's channels are worth, and the widths that were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.report.drawing import COLOURS, GREY, INK, PALE, legend, need, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
POINTS = 64  # of a line
WIDE = 50.0  # rises that spread further than this get a logarithmic axis
CHOSEN = "chosen width"


def plot_curves(rows: Rows, path: Path, title: str = "") -> Path:
    """Save `draw_curves`; returns ``path``."""
    return save(draw_curves(rows, title), path)


def draw_curves(rows: Rows, title: str = "") -> Figure:
    """Draw the rise of the loss against the kept channels, a line per FFN; and what was chosen, layer by layer.

    Lines are what allocators read: straight between measured widths, never falling with removal. A dot is the width
    that a plan chose. Where rows tell no choice, there is one panel.

    Args:
        rows: of `Curves.rows`.
        title: second line of the heading.
    """
    from matplotlib import colormaps

    need(rows, "measured points")
    sites = list(_by_site(rows))
    chosen = [one for one in sites if one[0]["chosen"] is not None]
    figure = new_figure(8.6 if chosen else 5.2, 4.0, "What single FFNs cost when they are cut", title)
    axes = figure.add_subplot(1, 2 if chosen else 1, 1)
    deepest = max(int(one[0]["layer"]) for one in sites) or 1
    colours = [colormaps["viridis"](0.2 + 0.7 * int(one[0]["layer"]) / deepest) for one in sites]
    bottom = _axes(axes, [float(row["rise"]) for row in rows])
    for one, colour in zip(sites, colours, strict=True):
        _line(axes, one, colour, bottom)
    shown: dict[str, Any] = {
        "first layer": axes.plot([], [], color=colormaps["viridis"](0.2))[0],
        "last layer": axes.plot([], [], color=colormaps["viridis"](0.9))[0],
    }
    if chosen:
        shown[CHOSEN] = axes.plot([], [], "o", color=INK, markersize=4)[0]
        shown["all FFNs"] = _widths(figure.add_subplot(1, 2, 2), chosen)
    legend(figure, shown)
    return figure


def _by_site(rows: Rows) -> Iterator[list[Mapping[str, Any]]]:
    """The rows of every site, widths rising."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row["site"]), []).append(row)
    for one in found.values():
        yield sorted(one, key=lambda row: int(row["width"]))


def _line(axes: Axes, rows: Rows, colour: Any, bottom: float) -> None:
    """One FFN; what is below the axis lies on its lower end."""
    import numpy as np

    d_ff = int(rows[0]["d_ff"])
    widths = [int(row["width"]) for row in rows]
    rises = np.array([float(row["rise"]) for row in rows] + [0.0])
    known = np.maximum.accumulate(rises[::-1])[::-1]
    at = np.unique(np.concatenate([np.linspace(widths[0], d_ff, POINTS), widths]))
    values = np.maximum(np.interp(at, [*widths, d_ff], known), bottom)
    axes.plot(100 * at / d_ff, values, color=colour, linewidth=0.9, alpha=0.8)
    axes.plot([100 * w / d_ff for w in widths], np.maximum(known[:-1], bottom), ".", color=colour, markersize=3)
    if rows[0]["chosen"] is not None:
        chosen = 100 * int(rows[0]["chosen"]) / d_ff, max(float(rows[0]["chosen_rise"]), bottom)
        axes.plot(*chosen, "o", color=INK, markersize=3.5, clip_on=False, zorder=4)


def _axes(axes: Axes, rises: Sequence[float]) -> float:
    """Set the axes up; returns the lower end."""
    above = sorted(rise for rise in rises if rise > 0)
    bottom = 0.0
    if above and above[-1] > WIDE * above[0]:
        bottom = max(above[0] / 3, above[-1] / 1e4)
        axes.set_yscale("log")
    axes.set_ylim(bottom=bottom)
    axes.set_xlim(0, 100)
    axes.set_xlabel("channels that stay in this FFN, %", color=INK, size=9)
    axes.set_ylabel("rise of the KL, nats per token", color=INK, size=9)
    axes.grid(color=PALE, linewidth=0.5)
    tidy(axes)
    return bottom


def _widths(axes: Axes, sites: Sequence[Rows]) -> Any:
    """Kept share by layer; returns the line of the mean."""
    layers = [int(one[0]["layer"]) for one in sites]
    shares = [100 * int(one[0]["chosen"]) / int(one[0]["d_ff"]) for one in sites]
    mean = 100 * sum(int(one[0]["chosen"]) for one in sites) / sum(int(one[0]["d_ff"]) for one in sites)
    axes.vlines(layers, mean, shares, color=PALE, linewidth=1)
    axes.plot(layers, shares, "o", color=INK, markersize=4)
    line = axes.axhline(mean, color=COLOURS[1], linewidth=1, linestyle="--")
    axes.set_ylim(0, 102)
    axes.set_xlabel("layer", color=INK, size=9)
    axes.set_ylabel("channels that stay, %", color=INK, size=9)
    axes.grid(color=PALE, linewidth=0.5, axis="y")
    axes.tick_params(colors=GREY)
    tidy(axes)
    return line


def draw_errors(rows: Rows, title: str = "") -> Figure:
    """Draw where the damage of a reconstructed model is: the error of every FFN's output, by layer, on a log scale.

    Args:
        rows: of `error_profile`, with the ``layer`` of every FFN; errors are shares of the output's power.
        title: second line of the heading.
    """
    need(rows, "errors of FFNs")
    figure = new_figure(6.4, 3.6, "Squared error of every FFN's output, as a share of its power", title)
    axes = figure.add_subplot()
    layers = [int(row["layer"]) for row in rows]
    without, after = ([max(float(row[key]), 1e-8) for row in rows] for key in ("error_without", "error"))
    axes.vlines(layers, after, without, color=PALE, linewidth=1)
    shown = {
        "without refit": axes.plot(layers, without, "o", color=GREY, markersize=4)[0],
        "with refit": axes.plot(layers, after, "o", color=COLOURS[0], markersize=4)[0],
    }
    axes.set_yscale("log")
    axes.set_xlabel("layer", color=INK, size=9)
    axes.set_ylabel("share of the power", color=INK, size=9)
    axes.grid(color=PALE, linewidth=0.5, axis="y")
    tidy(axes)
    legend(figure, shown)
    return figure
