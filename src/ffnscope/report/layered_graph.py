"""The FFN channels of a model as a layered graph: the top channels of each layer, and the strongest paths between them.

It draws plain nodes and edges, wherever they come from (see `ffnscope.analyze.paths`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.analyze.paths import ChannelNode, ChannelPath
from ffnscope.report.drawing import INK, PALE, need, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 40  # layers up to which every channel has its number under it
PATHS = ("#B5DCCB", "#41A7C4", "#1F5FA8", "#081D58")
WIDE = 10.0  # strengths and scores that spread further than this are drawn on a logarithmic scale
WIDEST = 2.4  # line width of the strongest path, in points
Places = Mapping[ChannelNode, tuple[float, float]]


def plot_layered_graph(nodes: Sequence[ChannelNode], paths: Sequence[ChannelPath], path: Path, title: str = "") -> Path:
    """Save `draw_layered_graph`; returns ``path``."""
    return save(draw_layered_graph(nodes, paths, title), path)


def draw_layered_graph(nodes: Sequence[ChannelNode], paths: Sequence[ChannelPath], title: str = "") -> Figure:
    """Draw channels as dots, a column per layer with the highest score on top, and paths as curves between them.

    The area of a dot grows with the score (all layers alike; the lowest score drawn has the smallest dot), width and
    colour of a curve with the strength; logarithmically where they spread more than 10 times. The number at a dot is
    its channel, after ``expert:`` in a mixture.

    Args:
        nodes: the channels to draw.
        paths: between channels among ``nodes``.
        title: second line of the heading, e.g. model and metric.
    """
    need(nodes, "channels")
    places = _places(nodes)
    layers = sorted({node.layer for node in nodes})
    rows = 1 + max(-y for _, y in places.values())
    heading = f"Top channels of each layer, and the {len(paths)} strongest direct paths between them"
    width = min(max(3.5 + 0.36 * len(layers), 6.0), 17.0)
    figure = new_figure(width, 1.9 + 0.62 * rows, heading, title)
    axes = figure.add_subplot()
    colours = _colours([one.strength for one in paths])
    for one in sorted(paths, key=lambda one: one.strength):  # the strongest on top
        _curve(axes, places[one.source], places[one.target], float(colours.norm(one.strength)), colours)
    _dots(axes, nodes, places)
    if len(layers) <= LABELLED:
        _labels(axes, places)
    step = 1 if len(layers) <= LABELLED else 5
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks([])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0.7 - rows, 0.75)
    axes.set_xlabel("layer", color=INK, size=9)
    axes.set_ylabel("higher score ↑", color=INK, size=9)
    tidy(axes)
    axes.spines["left"].set_visible(False)
    if paths:
        bar = figure.colorbar(colours, ax=axes, pad=0.01, aspect=18)
        bar.set_label("strength of a path", size=8, color=INK)
        bar.ax.tick_params(which="both", labelsize=8, colors=INK)
    return figure


def _colours(strengths: Sequence[float]) -> Any:
    """Colours of paths by strength, logarithmic where strengths spread widely."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    low, high = min(strengths, default=0.0), max(strengths, default=1.0)
    norm = LogNorm(low, high) if 0 < WIDE * low < high else Normalize(0, high or 1.0)
    return ScalarMappable(norm, LinearSegmentedColormap.from_list("paths", PATHS))


def _places(nodes: Sequence[ChannelNode]) -> dict[ChannelNode, tuple[float, float]]:
    """Column and row of every channel: the best of a layer is at 0, the next at -1."""
    layers = sorted({node.layer for node in nodes})
    found: dict[ChannelNode, tuple[float, float]] = {}
    for x, layer in enumerate(layers):
        column = sorted((n for n in nodes if n.layer == layer), key=lambda n: -n.score)
        found |= {node: (x, -y) for y, node in enumerate(column)}
    return found


def _curve(axes: Axes, start: tuple[float, float], end: tuple[float, float], share: float, colours: Any) -> None:
    """Draw a path that leaves and arrives level, and bows where it would run through the dots of its own row."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line

    reach = (end[0] - start[0]) / 2
    bow = 0.42 if start[1] == end[1] and end[0] - start[0] > 1 else 0.0
    points = [start, (start[0] + reach, start[1] + bow), (end[0] - reach, end[1] + bow), end]
    line = Line(points, [Line.MOVETO, Line.CURVE4, Line.CURVE4, Line.CURVE4])
    look = {"linewidth": 0.7 + (WIDEST - 0.7) * share, "edgecolor": colours.cmap(share), "alpha": 0.6 + 0.4 * share}
    axes.add_patch(PathPatch(line, facecolor="none", zorder=2, **look))


def _dots(axes: Axes, nodes: Sequence[ChannelNode], places: Places) -> None:
    import numpy as np

    scores = np.array([node.score for node in nodes])
    if scores.min() > 0 and scores.max() > WIDE * scores.min():
        scores = np.log(scores)
    spread = scores.max() - scores.min()
    sizes = 12 + 90 * (scores - scores.min()) / (spread or 1.0)
    at = [places[node] for node in nodes]
    axes.scatter(*zip(*at, strict=True), s=sizes, color="#D55E00", edgecolor="white", linewidth=0.6, zorder=3)


def _labels(axes: Axes, places: Places) -> None:
    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
    for node, (x, y) in places.items():
        axes.annotate(
            node.name,
            (x, y),
            (0, -8),
            textcoords="offset points",
            ha="center",
            va="center",
            size=6,
            color=INK,
            bbox=box,
        ).set_zorder(4)
    axes.set_facecolor("white")
    axes.grid(axis="x", color=PALE, linewidth=0.4)
