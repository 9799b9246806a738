"""Plots of a validation: which ranking to trust, how two scores compare, and loss against removal order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.analyze.agreement import spearman
from ffnscope.analyze.validate import FLOOR, Validation
from ffnscope.errors import UsageError
from ffnscope.report.drawing import COLOURS, GREY, INK, PALE, STYLES, legend, need, new_figure, save, tidy
from ffnscope.report.summary import as_array, natural_sign
from ffnscope.report.tables import result
from ffnscope.types import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from ffnscope.evaluate.compare import EvalRow

MANY = 20_000  # dots of a scatter plot; more are thinned evenly
MEASURES = (("loss", "loss change"), ("token", "token change"))
MOST_CURVES = 12


def plot_validation(found: Validation, folder: Path, title: str = "") -> list[Path]:
    """Save all plots of a validation as PNG into a folder; returns their paths.

    ``rank_quality.png``, ``measured.png``, ``scores.png`` (the two best metrics), and ``percolation.png`` where
    something was pruned.
    """
    made = [save(draw_rank_quality(found, title), folder / "rank_quality.png")]
    best = [one.metric for one in found.qualities if one.metric != FLOOR][:2] or [FLOOR]
    made.append(save(draw_measured(found, best[0], title), folder / "measured.png"))
    if len(best) == 2:
        first, second = (found.scores[name] for name in best)
        made.append(save(draw_score_scatter(first, second, title), folder / "scores.png"))
    if found.dense:
        made.append(save(draw_percolation(found, title), folder / "percolation.png"))
    return made


def draw_rank_quality(found: Validation, title: str = "") -> Figure:
    """Draw every metric's correlation with the measured changes, a dot with its 95 % interval; best on top.

    One panel for the signed change of the mean loss, one for the mean absolute change of a token's loss. The dashed
    line is the correlation of the changes on one half of the documents with those on the other.
    """
    need(found.qualities, "metrics")
    names = [one.metric for one in found.qualities]
    figure = new_figure(9.5, 1.7 + 0.21 * len(names), "Spearman with measured changes (single channels removed)", title)
    for index, (field, what) in enumerate(MEASURES):
        axes = figure.add_subplot(1, 2, index + 1)
        for y, one in enumerate(found.qualities):
            measured = getattr(one, field)
            if measured.value is None:
                continue
            low, high = measured.interval or (measured.value, measured.value)
            colour = GREY if one.metric == FLOOR else COLOURS[0]
            axes.hlines(y, low, high, color=colour, linewidth=1.6, alpha=0.6)
            axes.plot(measured.value, y, "o", color=colour, markersize=4.5)
        axes.axvline(0, color=INK, linewidth=0.6)
        half = getattr(found.between_halves, field).value
        if half is not None:
            axes.axvline(half, color=COLOURS[1], linewidth=1, linestyle="--")
        axes.set_yticks(range(len(names)), names if index == 0 else [""] * len(names), parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(min(-0.3, axes.get_xlim()[0]), 1.03)
        axes.grid(axis="both", color=PALE, linewidth=0.5)
        dashes = "" if half is None else " (dashed: between halves of the text)"
        axes.set_xlabel(what + dashes, color=INK, size=9)
        tidy(axes)
    return figure


def draw_measured(found: Validation, metric: str, title: str = "") -> Figure:
    """Draw one metric's scores against both measured changes, a dot per ablated channel, coloured by layer."""
    ablation = found.ablation
    scores = found.scores[metric].values
    figure = new_figure(9.5, 4.2, f"{metric} and what removing a channel does", title)
    layers = [site.layer for site, index in ablation.channels.items() for _ in index]
    x = _joined({site: scores[site][index] for site, index in ablation.channels.items()}) * natural_sign(metric)
    changes = (ablation.loss_change(), ablation.token_change())
    image: Any = None
    for number, ((_, what), change) in enumerate(zip(MEASURES, changes, strict=True), start=1):
        axes = figure.add_subplot(1, 2, number)
        y = _joined(change)
        image = axes.scatter(x, y, c=layers, cmap="viridis", s=14, linewidth=0, alpha=0.85)
        _spread_axis(axes, x, "x")
        _spread_axis(axes, y, "y")
        axes.set_xlabel(metric, color=INK, size=9, parse_math=False)
        axes.set_ylabel(f"{what}, nats per token", color=INK, size=9)
        axes.grid(color=PALE, linewidth=0.5)
        tidy(axes)
    _layer_bar(figure, image)
    return figure


def draw_score_scatter(first: Scores, second: Scores, title: str = "") -> Figure:
    """Draw one score against another (natural values), a dot per channel, coloured by layer.

    Axes are logarithmic where values are positive and spread widely. Of more than 20,000 channels every n-th is drawn;
    Spearman's correlation in the heading is that of all.

    Raises:
        UsageError: the scores are of different FFNs.
    """
    import numpy as np

    if first.values.keys() != second.values.keys():
        raise UsageError(
            f"{first.metric!r} and {second.metric!r} scored different FFNs; score the same layers by both."
        )
    need(first.values, "scores")
    x, y = (_joined(one.values) * natural_sign(one.metric) for one in (first, second))
    r = spearman(*(_tensor(v * natural_sign(o.metric)) for v, o in ((x, first), (y, second))))
    step = math.ceil(len(x) / MANY)
    layers = np.array([site.layer for site in first.values for _ in range(site.d_ff)])
    shown = np.random.default_rng(0).permutation(np.arange(0, len(x), step))  # else the last layer hides the others
    told = "" if r is None else f", Spearman {r:.2f}"
    figure = new_figure(7.4, 5.0, f"{first.metric} and {second.metric}{told}", title)
    axes = figure.add_subplot()
    image = axes.scatter(
        x[shown], y[shown], c=layers[shown], cmap="viridis", s=3, linewidth=0, alpha=0.5, rasterized=True
    )
    for values, one, axis in ((x, first, "x"), (y, second, "y")):
        _spread_axis(axes, values, axis)
        label = axes.set_xlabel if axis == "x" else axes.set_ylabel
        label(one.metric, color=INK, size=9, parse_math=False)
    axes.grid(color=PALE, linewidth=0.5)
    tidy(axes)
    _layer_bar(figure, image)
    return figure


def draw_percolation(found: Validation, title: str = "") -> Figure:
    """Draw the rise of the loss as channels are removed in the order of each metric, a panel per allocator.

    The loss is the mean token NLL above the unpruned model's. Of more than 12 metrics those with the lowest rise at the
    highest sparsity are drawn, and ``random``. The axis is logarithmic.
    """
    if found.dense is None:
        raise UsageError("nothing was pruned, so there is no loss to draw; validate with at least one sparsity.")
    dense = _nll(found.dense)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (metric, allocator, _), row in found.pruned.items():
        curves.setdefault(allocator, {}).setdefault(metric, []).append((100 * row.sparsity, _nll(row) - dense))
    shown = _lowest(curves)
    looks = _looks(shown)
    figure = new_figure(1.0 + 3.9 * len(curves), 4.4, "Rise of the loss when channels are removed, by ranking", title)
    handles: dict[str, Any] = {}
    for index, (allocator, by_metric) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        for metric in shown:
            at, rise = zip(*sorted(by_metric[metric]), strict=True)
            handles[metric] = axes.plot(at, rise, linewidth=1.4, markersize=4.5, **looks[metric])[0]
        _rise_axes(axes, sorted({x for line in by_metric.values() for x, _ in line}))
        axes.set_title(allocator, fontsize=9, color=INK, parse_math=False)
    legend(figure, handles)
    return figure


def _lowest(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> list[str]:
    """Metrics to draw, the lowest sum over panels of the rise at the highest sparsity first, ``random`` last."""
    metrics = [name for name in next(iter(curves.values())) if name != FLOOR]
    metrics.sort(key=lambda name: sum(max(lines[name])[1] for lines in curves.values()))
    return [*metrics[: MOST_CURVES - 1], *([FLOOR] if FLOOR in next(iter(curves.values())) else [])]


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        marker, style = STYLES[index // len(COLOURS) % len(STYLES)]
        found[name] = {"color": COLOURS[index % len(COLOURS)], "marker": marker, "linestyle": style}
    if FLOOR in found:
        found[FLOOR] = {"color": GREY, "marker": "x", "linestyle": "--"}
    return found


def _rise_axes(axes: Axes, at: Sequence[float]) -> None:
    import numpy as np
    from matplotlib.ticker import FuncFormatter

    rises = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if rises.min() > 0:
        axes.set_yscale("log")
    elif rises.max() > 0:
        axes.set_yscale("symlog", linthresh=_near_zero(rises))
    if len(at) <= 10:
        axes.set_xticks(at)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    # within a few decades there are too few powers of ten to read the axis by
    between = {"2", "3", "5"} if high > 4 * low else set("23456789")
    named = between if low > 0 and high < 300 * low else set[str]()
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in named else ""))
    axes.set_xlabel("channels removed, lowest score first", color=INK, size=9)
    axes.set_ylabel("rise of the loss, nats per token", color=INK, size=9)
    axes.grid(color=PALE, linewidth=0.5)
    tidy(axes)


def _spread_axis(axes: Axes, values: Any, axis: str) -> None:
    """Make an axis logarithmic where its values spread widely: symmetrically where they have both signs."""
    import numpy as np

    size = np.abs(values[values != 0])
    if not size.size or size.max() <= 100 * np.quantile(size, 0.05):
        return
    scale = axes.set_xscale if axis == "x" else axes.set_yscale
    if values.min() >= 0:
        scale("log", nonpositive="mask")
    else:
        scale("symlog", linthresh=_near_zero(values))


def _near_zero(values: Any) -> float:
    """Power of ten below which an axis of both signs is linear: that of the median size."""
    import numpy as np

    return 10.0 ** math.floor(math.log10(float(np.median(np.abs(values[values != 0])))))


def _layer_bar(figure: Figure, image: Any) -> None:
    bar = figure.colorbar(image, ax=figure.axes, pad=0.02, aspect=24)
    bar.set_label("layer", size=8, color=INK)
    solids: Any = bar.solids
    solids.set_alpha(1)
    bar.ax.tick_params(which="both", labelsize=8, colors=INK)


def _joined(values: Mapping[Any, Tensor]) -> Any:
    import numpy as np

    return np.concatenate([as_array(value) for value in values.values()])


def _tensor(values: Any) -> Tensor:
    import torch

    return torch.as_tensor(values)


def _nll(row: EvalRow) -> float:
    found = result(row, "perplexity")
    assert found is not None, "every row has a perplexity"
    return math.log(found.value)
