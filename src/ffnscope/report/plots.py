"""Plots of a run: PNG at 150 dpi, or SVG and PDF by suffix.

Every ``draw_*`` builds a figure and every ``plot_*`` saves it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ffnscope.report.inline_svg import tip
from ffnscope.report.summary import Matrix, as_array, natural_sign
from ffnscope.report.tables import FLOOR, Panel, number, panels, percent, result
from ffnscope.types import Scores

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from ffnscope.evaluate.compare import EvalRow
    from ffnscope.types import FFNSite

BANDS = ((0.01, 0.99, "#CFE3F1"), (0.05, 0.95, "#8FBFDF"), (0.25, 0.75, "#3A86BD"))
WIDE = 100.0  # scores that spread further than this get a logarithmic axis
FOLD = 4  # the heat map's colours end at 2^4 = 16 times the mean


def plot_score_distributions(
    scores: Scores, path: Path, core: Mapping[FFNSite, Tensor] | None = None, title: str = ""
) -> Path:
    """Save `draw_score_distributions`; returns ``path``."""
    return save(draw_score_distributions(scores, core, title), path)


def plot_heatmap(scores: Mapping[str, Scores], path: Path, title: str = "") -> Path:
    """Save `draw_heatmap`; returns ``path``."""
    return save(draw_heatmap(scores, title), path)


def plot_perplexity(rows: Sequence[EvalRow], path: Path, title: str = "") -> Path:
    """Save `draw_perplexity`; returns ``path``."""
    return save(draw_perplexity(rows, title), path)


def plot_rank_correlation(names: Sequence[str], matrix: Matrix, path: Path, title: str = "") -> Path:
    """Save `draw_rank_correlation`; returns ``path``."""
    return save(draw_rank_correlation(names, matrix, title), path)


def draw_score_distributions(scores: Scores, core: Mapping[FFNSite, Tensor] | None = None, title: str = "") -> Figure:
    """Draw one metric's distribution over the channels of each layer: nested quantile bands, median, top 1 %, maximum.

    Natural values are drawn. Channels of sites that share a layer (experts) are pooled. The axis is logarithmic where
    the values are not negative and spread more than 100 times, and linear near zero but logarithmic beyond where they
    are signed and spread as much.

    Args:
        scores: scores of one metric, site -> [d_ff].
        core: site -> indices of its core channels; their range and median are drawn over the bands.
        title: second line of the heading, e.g. model and calibration tokens.
    """
    import numpy as np

    need(scores.values, "scores")
    sign = natural_sign(scores.metric)
    layers = _by_layer({site: as_array(value) * sign for site, value in scores.values.items()})
    figure = new_figure(_width(len(layers)), 4.2, f"{scores.metric}: distribution over channels, per layer", title)
    axes = figure.add_subplot()
    unit = "score" if sign > 0 else "natural value (low = keep)"
    axes.set_ylabel(unit + _value_axis(axes, list(layers.values())), color=INK, size=9)
    at = np.arange(len(layers))
    best, top = (np.max, 0.99) if sign > 0 else (np.min, 0.01)
    _tell_layers(axes, layers, sign)
    shown: dict[str, Any] = {}
    shown["best channel"] = axes.plot(at, [best(v) for v in layers.values()], ".", color=INK, markersize=4, zorder=4)[0]
    shown["top 1 % begins"] = _marks(axes, at, [np.quantile(v, top) for v in layers.values()], COLOURS[1])
    for low, high, colour in BANDS:
        lower, upper = (np.array([np.quantile(v, q) for v in layers.values()]) for q in (low, high))
        bars = axes.bar(at, upper - lower, 0.86, bottom=lower, color=colour, zorder=2)
        shown[f"{100 * low:g}–{100 * high:g} % of channels"] = bars[0]
    median = _marks(axes, at, [np.median(v) for v in layers.values()], "white")
    shown["median"] = (shown["25–75 % of channels"], median)  # drawn over each other: white would not show alone
    if core:
        picked = {site: as_array(scores.values[site][index]) * sign for site, index in core.items()}
        shown["core: range, median"] = _core_marks(axes, list(layers), picked)
    _layer_ticks(axes, list(layers))
    legend(figure, shown)
    return figure


def draw_heatmap(scores: Mapping[str, Scores], title: str = "") -> Figure:
    """Draw, for each metric, where in the model its scores are high: layers across, metrics down.

    A cell is log2 of (mean over the layer's channels / mean over all channels) of that metric, so that 0 (white) is
    the metric's own average and rows can be compared whatever their units. Colours end at 16 times. Grey: the metric
    did not score the layer, or the ratio is not positive (means of opposite sign, or zero) and has no logarithm.
    """
    import numpy as np

    need(any(one.values for one in scores.values()), "scores")
    layers = sorted({site.layer for one in scores.values() for site in one.values})
    cells = _log_ratios(scores, layers)
    known = cells[~np.isnan(cells)]
    limit = min(max(math.ceil(abs(known).max(initial=0.0)), 1), FOLD)
    figure = new_figure(_width(len(layers), 2.2), 1.75 + 0.27 * len(scores), "Mean score per layer and metric", title)
    axes = figure.add_subplot()
    image = _image(axes, cells, limit, "auto")
    for (row, column), value in np.ndenumerate(cells):
        times = "no positive ratio" if math.isnan(value) else f"{2**value:.3g} times the metric's mean"
        tip(axes, column, row, f"{list(scores)[row]}, layer {layers[column]}: {times}", width=1, height=1)
    axes.set_yticks(range(len(scores)), list(scores), parse_math=False)
    _layer_ticks(axes, layers)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    if known.size < cells.size:
        axes.set_xlabel("layer (grey: no positive ratio)", color=INK, size=9)
    extend = {0: "neither", 1: "min", 2: "max", 3: "both"}[(known < -limit).any() + 2 * (known > limit).any()]
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.015, aspect=12)
    powers = range(-limit, limit + 1, 2 if limit == FOLD else 1)
    bar.set_ticks(list(powers), labels=[f"1/{2**-k}" if k < 0 else str(2**k) for k in powers])
    bar.set_label("layer mean /\noverall mean", size=8, color=INK)
    bar.ax.tick_params(which="both", labelsize=8, colors=INK)
    return figure


def draw_perplexity(rows: Sequence[EvalRow], title: str = "") -> Figure:
    """Draw perplexity against achieved sparsity: a panel per dataset, a line per metric, error bars of one stderr.

    The bars are those of the mean NLL, so on a logarithmic axis both ends are defined.

    The dense model is a dashed black line, ``random`` (the floor) dashed grey. The axis is logarithmic where the
    largest perplexity is more than 5 times the smallest. The legend is in the order of the right ends of the lines.
    """
    need(rows, "evaluation rows")
    found = panels(rows)
    figure = new_figure(0.6 + (4.6 if len(found) < 3 else 3.6) * len(found), 4.2, "Perplexity after pruning", title)
    names = list(dict.fromkeys(name for panel in found for name in panel.lines))
    looks = _looks(names, found)
    shown: dict[str, tuple[float, Any]] = {}
    for index, panel in enumerate(found):
        axes = figure.add_subplot(1, len(found), index + 1)
        axes.set_title(textwrap.fill(panel.dataset, 46), fontsize=9, color=INK, parse_math=False)
        for name, line in panel.lines.items():
            curve, last = _curve(axes, list(line.values()), looks[name])
            shown.setdefault(name, (last, curve))
        _perplexity_axis(axes, panel)
    legend(figure, {name: shown[name][1] for name in sorted(shown, key=lambda name: -shown[name][0])})
    return figure


def draw_rank_correlation(names: Sequence[str], matrix: Matrix, title: str = "") -> Figure:
    """Draw Spearman's rank correlation of metrics [M][M], averaged over sites; None (undefined) is grey."""
    import numpy as np

    need(names, "metrics")
    side = 0.46 * len(names) + 2.6
    figure = new_figure(
        max(side + 0.8, 5.2), max(side, 3.2), "Rank correlation between metrics, mean over sites", title
    )
    axes = figure.add_subplot()
    cells = np.array([[np.nan if v is None else v for v in row] for row in matrix], dtype=float)
    image = _image(axes, cells, 1.0, "equal")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    for (i, j), value in np.ndenumerate(cells):
        text = "–" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
        tip(axes, j, i, f"{names[i]} and {names[j]}: {text}", width=1, height=1)
        axes.text(
            j, i, text, ha="center", va="center", size=7, color=PALE_ON_CELL if abs(value) > 0.65 else DARK_ON_CELL
        )
    bar = figure.colorbar(image, ax=axes, pad=0.02, shrink=0.8)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.ax.tick_params(which="both", labelsize=8, colors=INK)
    return figure


def _width(n_layers: int, extra: float = 0.0) -> float:
    return min(max(4.5 + 0.07 * n_layers, 5.5), 10.0) + extra


def _by_layer(values: Mapping[FFNSite, NDArray[np.float64]]) -> dict[int, NDArray[np.float64]]:
    """Pool the channels of the sites of each layer, layers in rising order."""
    import numpy as np

    layers = sorted({site.layer for site in values})
    return {layer: np.concatenate([v for site, v in values.items() if site.layer == layer]) for layer in layers}


def _layer_ticks(axes: Axes, layers: list[int]) -> None:
    """Label positions 0, 1, ... with layer indices, as many as can be read."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(layers) <= 20 * s)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer", color=INK, size=9)
    tidy(axes)


def _value_axis(axes: Axes, values: list[NDArray[np.float64]]) -> str:
    """Choose a linear, logarithmic or symmetric logarithmic axis; returns what its label must add."""
    import numpy as np

    axes.use_sticky_edges = False
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    everything = np.concatenate(values)
    size = np.abs(everything[everything != 0])
    if size.size == 0 or size.max() <= WIDE * np.quantile(size, 0.01):
        return ""
    if everything.min() >= 0:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(np.quantile(v[v > 0], 0.01) for v in values if v.any()) / 1.5, everything.max() * 1.5)
        return ", zeros below the axis" if everything.min() == 0 else ""
    threshold = 10.0 ** math.floor(math.log10(float(np.median(size))))
    axes.set_yscale("symlog", linthresh=threshold)
    axes.axhspan(-threshold, threshold, color="#F4F4F4", zorder=0)
    return f", linear within ±{threshold:g} (shaded)"


def _tell_layers(axes: Axes, layers: Mapping[int, NDArray[np.float64]], sign: int) -> None:
    """Say each layer's median and range where the pointer is over it."""
    import numpy as np

    low, high = (f([f(v) for v in layers.values()]) for f in (min, max))
    for at, (layer, values) in enumerate(layers.items()):
        best = "largest" if sign > 0 else "lowest"
        extreme = float(values.max() if sign > 0 else values.min())
        text = f"layer {layer}: median {number(float(np.median(values)))}, {best} {number(extreme)}"
        tip(axes, at, float(low + high) / 2, text, width=0.9, height=float(high - low))


def _marks(axes: Axes, at: NDArray[Any], heights: Sequence[float], colour: str) -> Any:
    return axes.hlines(heights, at - 0.43, at + 0.43, color=colour, linewidth=1.4, zorder=3)


def _core_marks(axes: Axes, layers: list[int], core: Mapping[FFNSite, NDArray[np.float64]]) -> Any:
    """Draw range and median of the core channels of each layer; returns the handle for the legend."""
    import numpy as np

    pooled = _by_layer({site: values for site, values in core.items() if values.size})
    at = [layers.index(layer) for layer in pooled]
    low, middle, high = ([f(v) for v in pooled.values()] for f in (np.min, np.median, np.max))
    bottom, _ = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(bottom=min([bottom, *(v / 1.5 for v in low if v > 0)]))
    axes.vlines(at, low, high, color=COLOURS[2], linewidth=1.1, zorder=5)
    size = 3.5 if len(layers) <= 40 else 2.2
    return axes.plot(at, middle, "D", color=COLOURS[2], markersize=size, zorder=5)[0]


def _log_ratios(scores: Mapping[str, Scores], layers: list[int]) -> NDArray[np.float64]:
    """log2(layer mean / overall mean) [n_metrics, n_layers]; NaN where it is not defined."""
    import numpy as np

    cells = np.full((len(scores), len(layers)), np.nan)
    for row, one in enumerate(scores.values()):
        pooled = _by_layer({site: as_array(value) for site, value in one.values.items()})
        overall = np.concatenate(list(pooled.values())).mean()
        for layer, values in pooled.items():
            ratio = values.mean() / overall if overall else 0.0
            cells[row, layers.index(layer)] = math.log2(ratio) if ratio > 0 else np.nan
    return cells


def _image(axes: Axes, cells: NDArray[np.float64], limit: float, aspect: Any) -> Any:
    axes.set_facecolor(PALE)  # shows through where a cell is NaN
    image = axes.imshow(cells, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect=aspect, interpolation="nearest")
    tidy(axes)
    return image


def _looks(names: list[str], found: list[Panel]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style per line name: the dense model and the floor have their own."""
    rows = {name: next(iter(panel.lines[name].values())) for panel in found for name in panel.lines}
    looks: dict[str, dict[str, Any]] = {}
    n_metrics = 0
    for name in names:
        if rows[name].metric is None:
            looks[name] = {"color": INK, "linestyle": "--"}
        elif rows[name].metric == FLOOR:
            looks[name] = {"color": GREY, "linestyle": "--", "marker": "x"}
        else:
            marker, style = STYLES[n_metrics // len(COLOURS) % len(STYLES)]
            looks[name] = {"color": COLOURS[n_metrics % len(COLOURS)], "linestyle": style, "marker": marker}
            n_metrics += 1
    return looks


def _curve(axes: Axes, rows: list[EvalRow], look: dict[str, Any]) -> tuple[Any, float]:
    """Draw one line with error bars; returns its handle for the legend and its perplexity at the highest sparsity."""
    points = [(100 * row.sparsity, one.value, one.stderr or 0.0) for row in rows if (one := result(row, "perplexity"))]
    at, values, errors = zip(*sorted(points), strict=True)
    if rows[0].metric is None:
        across = axes.get_yaxis_transform()
        axes.text(1.01, values[0], number(values[0]), transform=across, ha="left", va="center", size=7, color=INK)
        return axes.axhline(values[0], linewidth=1.2, zorder=2, **look), values[0]
    around = [[v * -math.expm1(-e / v), v * math.expm1(min(e / v, 20))] for v, e in zip(values, errors, strict=True)]
    axes.errorbar(
        at,
        values,
        list(zip(*around, strict=True)),
        fmt="none",
        ecolor=look["color"],
        elinewidth=1.2,
        capsize=2.5,
        zorder=3,
    )
    for x, value, error in zip(at, values, errors, strict=True):
        tip(axes, x, value, f"{rows[0].metric}, {percent(x / 100)} removed: perplexity {number(value, error)}")
    return axes.plot(at, values, linewidth=1.4, markersize=4.5, zorder=3, **look)[0], values[-1]


def _perplexity_axis(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [one.value for line in panel.lines.values() for r in line.values() if (one := result(r, "perplexity"))]
    low, high = min(values), max(values)
    if high > 5 * low:
        axes.set_yscale("log")
        margin = (high / low) ** 0.05
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_minor_formatter(NullFormatter())
        if high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(color=PALE, linewidth=0.5)
    asked = [100 * s for s in panel.sparsities if s > 0]
    if len(asked) <= 10:
        axes.set_xticks(asked)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value / 100)))
    axes.set_xlabel("sparsity (channels removed)", color=INK, size=9)
    axes.set_ylabel("perplexity (lower is better)", color=INK, size=9)
    tidy(axes)
