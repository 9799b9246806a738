"""What all plots share: figures, files, colours, axes and legends.

Figures are made object by object, so that nothing here reads or changes the state of ``pyplot``; matplotlib is imported
inside functions only.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.errors import UsageError
from ffnscope.saving import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, told apart with any common colour blindness; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))
GREY, PALE, INK = "#8A8A8A", "#D9D9D9", "#333333"
# for words on coloured cells, which stay as they are on a dark screen (see `inline_svg`)
DARK_ON_CELL, PALE_ON_CELL = "#333332", "#FEFEFE"


def new_figure(width: float, height: float, heading: str, title: str) -> Figure:
    """Return an empty figure with a heading and a smaller title under it; raises UsageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UsageError(
            "plots need matplotlib, which is not installed: pip install 'ffnscope[plots]', or run without plots."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    room = int(13 * (width - 0.3))
    text = "\n".join([*textwrap.wrap(heading, room), *textwrap.wrap(title, room)])
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, color=INK, parse_math=False)
    return figure


def need(found: object, what: str) -> None:
    """Raise UsageError when there is nothing to plot."""
    if not found:
        raise UsageError(f"nothing to plot: got no {what}; expected at least one.")


def save(figure: Figure, path: Path) -> Path:
    """Save a figure as PNG, SVG or PDF, atomically; returns ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot plot to {path.name!r}: expected a name that ends in {', '.join(SUFFIXES)}.")
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.lower()[1:], dpi=DPI)
    return path


def tidy(axes: Axes) -> None:
    """Small ticks, no box."""
    axes.tick_params(which="both", labelsize=8, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def legend(figure: Figure, shown: Mapping[str, Any]) -> None:
    """Put a legend under the axes, in as many columns as fit, and make the figure higher by it: name -> handle."""
    width, height = figure.get_size_inches()
    columns = max(1, min(len(shown), int((width - 0.2) / (0.55 + 0.065 * max(map(len, shown), default=0)))))
    figure.set_size_inches(width, height + 0.1 + 0.18 * math.ceil(len(shown) / columns))
    look: Any = {"loc": "outside lower left", "ncols": columns, "columnspacing": 1.2}
    drawn = figure.legend(list(shown.values()), list(shown), **look, fontsize=8, frameon=False, labelcolor=INK)
    for text in drawn.get_texts():
        text.set_parse_math(False)
