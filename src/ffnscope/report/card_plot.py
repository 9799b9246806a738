"""The plot of a sparsity card: what its selections do, by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.report.drawing import COLOURS, INK, PALE, legend, need, new_figure, save, tidy
from ffnscope.report.sparse_plots import Cost, draw_cells, draw_quality
from ffnscope.sparse.card import SiteCard, SparsityCard
from ffnscope.sparse.card_curve import lines_of
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.evaluation import FormRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"recall": "recall, %", "density": "density, %", "missed_mass": "missed mass, %"}
LINES = {"test": "test documents", "second": "second text"}


LAYERS = (
    "Recall, density and missed mass of every FFN, means over tokens, on documents that had no part in the card and, "
    "where one was given, on a second text."
)
HEAT = (
    "The same and more as a map, means over tokens: precision, relative error of the output, and what is missed more "
    "than by as many channels with the largest contributions (gap)."
)
CELLS = ("recall", "precision", "density", "missed_mass", "missed_mass_gap", "relative_error")
CURVES: dict[Cost, str] = {
    "density": "Perplexity on the test documents against density: the rule of the card, and others. An oracle orders "
    "channels by what they do contribute; a static rule selects the same ones for all tokens. Bars are 95 % intervals "
    "over documents.",
    "bytes_share": "The same against the bytes that the FFNs read per token, those of the predictor included, in "
    f"{UNIT}.",
}


def card_figures(
    card: SparsityCard, curve: Sequence[FormRow] = (), title: str = ""
) -> Iterator[tuple[str, str, Figure]]:
    """Draw what a page shows of a card: (section, caption, figure), of the sections "layers" and "curve"."""
    yield "layers", LAYERS, draw_card(card, title)
    yield "layers", HEAT, draw_card_cells(card, title)
    lines = lines_of(curve)
    for cost, caption in CURVES.items() if lines else ():
        yield "curve", caption, draw_quality(lines, cost, title)


def plot_card(card: SparsityCard, path: Path, title: str = "") -> Path:
    """Save `draw_card`; returns ``path``."""
    return save(draw_card(card, title), path)


def draw_card(card: SparsityCard, title: str = "") -> Figure:
    """Draw recall, density and missed mass by FFN in the order of the model, a line per text.

    Args:
        card: with figures.
        title: second line of the heading.

    Raises:
        UsageError: the card has no figures, or matplotlib is not installed.
    """
    from matplotlib.ticker import MaxNLocator

    sources = [name for name in LINES if any(name in one.figures for one in card.sites)]
    need(sources, "figures of a card")
    figure = new_figure(10.5, 3.4, "Selections by layer", title)
    shown: dict[str, Any] = {}
    for place, (measure, label) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(1, len(PANELS), place)
        for index, source in enumerate(sources):
            shown[LINES[source]] = _line(axes, card, source, measure, COLOURS[index])
        axes.set_ylabel(label, color=INK, size=9)
        axes.set_xlabel("FFN, in the order of the model", color=INK, size=9)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=PALE, linewidth=0.5)
        tidy(axes)
    legend(figure, shown)
    return figure


def draw_card_cells(card: SparsityCard, title: str = "") -> Figure:
    """Draw measures by layer as a heat map, a row per measure and text; FFNs of one layer (experts) are averaged.

    Args and errors as of `draw_card`.
    """
    layers = sorted({one.site.layer for one in card.sites})
    rows: dict[str, list[float]] = {}
    for source, words in LINES.items():
        for name in CELLS:
            found = [_mean([one for one in card.sites if one.site.layer == layer], source, name) for layer in layers]
            if not all(map(math.isnan, found)):
                rows[f"{name.replace('_', ' ')}, {words}"] = found
    need(rows, "figures of a card")
    return draw_cells(rows, layers, "Selections by layer", title)


def _mean(sites: Sequence[SiteCard], source: Any, name: str) -> float:
    found = [one.figures[source][name].mean for one in sites if name in one.figures.get(source, {})]
    return sum(found) / len(found) if found else math.nan


def _line(axes: Axes, card: SparsityCard, source: Any, measure: str, colour: str) -> Any:
    found = [(at, one.figures[source][measure]) for at, one in enumerate(card.sites) if source in one.figures]
    places = [at for at, _ in found]
    low, high = ([100 * value for value in ends] for ends in zip(*((f.p5, f.p95) for _, f in found), strict=True))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    return axes.plot(places, [100 * f.mean for _, f in found], "o-", color=colour, markersize=2.5, linewidth=1.2)[0]
