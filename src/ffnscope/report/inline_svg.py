"""Figures as SVG inside a page: text that can be read and selected, colours of the page, and values on hover."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ffnscope.report.drawing import INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SCALE = 0.85  # pixels per point: on a narrow screen a figure shrinks that far, then scrolls
POINTS = 72  # per inch: the unit of an SVG by matplotlib
THEME = {INK: "var(--ink)", "#000000": "var(--ink)", PALE: "var(--line)", "#ffffff": "var(--paper)"}
"""Colours of a figure -> the page's own, which follow a light or a dark screen."""


@dataclass(frozen=True, slots=True)
class _Tip:
    """What a rectangle of the data says; sizes in units of the axes, or a dot of a few points where they are 0."""

    axes: Axes
    x: float
    y: float
    width: float
    height: float
    text: str


_TIPS: WeakKeyDictionary[Any, list[_Tip]] = WeakKeyDictionary()


def tip(axes: Axes, x: float, y: float, text: str, *, width: float = 0.0, height: float = 0.0) -> None:
    """Say ``text`` where the pointer is over a place of the axes: a rectangle around (x, y), or a dot without a size.

    Files of a figure (`save`) do not have these texts; `inline_svg` does.
    """
    figure: Any = axes.get_figure(root=True)
    _TIPS.setdefault(figure, []).append(_Tip(axes, x, y, width, height, text))


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as one ``<svg>`` element.

    Args:
        figure: by `new_figure`. It is not drawn on afterwards.
        name: identifier, unique in the page: ids inside the element start with it.
        description: what the figure shows, for those who cannot see it.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    figure.set_dpi(POINTS)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") : text.rindex("</svg>")]
    head, _, inside = body.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None, "matplotlib wrote an SVG without a size"
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, count=1, flags=re.DOTALL)
    inside = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', inside)
    inside = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", inside)
    for colour, own in THEME.items():
        inside = re.sub(re.escape(colour), own, inside, flags=re.IGNORECASE)
    width = round(float(box[1].split()[2]))
    label = escape(description, quote=True)
    tips = "".join(_drawn(one, float(box[1].split()[3])) for one in _TIPS.get(figure, ()))
    sizes = f"max-width:{width * 4 // 3}px; min-width:{width * LEAST_SCALE:.0f}px"
    return (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{label}" style="{sizes}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{inside}<g class="tips">{tips}</g></svg>'
    )


def _drawn(one: _Tip, height: float) -> str:
    """Transparent shape with a title; the y axis of an SVG points down."""
    to_points = one.axes.transData
    if one.width or one.height:
        half = one.width / 2, one.height / 2
        (x0, y0), (x1, y1) = to_points.transform(
            [(one.x - half[0], one.y - half[1]), (one.x + half[0], one.y + half[1])]
        )
        left, top, wide, high = min(x0, x1), height - max(y0, y1), abs(x1 - x0), abs(y1 - y0)
        shape = f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}">'
    else:
        x, y = to_points.transform((one.x, one.y))
        shape = f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="6">'
    end = "</rect>" if shape.startswith("<rect") else "</circle>"
    return f"{shape}<title>{escape(one.text)}</title>{end}"
