"""A sparsity card as one page: what was found, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ffnscope.report.card_plot import card_figures
from ffnscope.report.card_table import card_grids, card_sentences, curve_grid
from ffnscope.report.figures import PageFigure
from ffnscope.report.inline_svg import inline_svg
from ffnscope.report.page import Part, write_page
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.evaluation import FormRow


def write_card_page(path: Path, card: SparsityCard, curve: Sequence[FormRow] = ()) -> Path:
    """Write the card, and a curve where one was measured, as one HTML file that needs nothing else; returns ``path``.

    Raises:
        UsageError: matplotlib is not installed.
        ArtifactError: the file cannot be written.
    """
    drawn = [
        PageFigure(section, caption, inline_svg(figure, f"c{index}", caption))
        for index, (section, caption, figure) in enumerate(card_figures(card, curve))
    ]

    def of(section: str) -> list[PageFigure]:
        return [one for one in drawn if one.section == section]

    *grids, sites = card_grids(card)
    parts = [
        Part("found", "What was found", card_sentences(card), grids),
        Part("curve", "Other densities", [], [curve_grid(curve)] if curve else [], of("curve")),
        Part("layers", "FFN by FFN", [], [sites], of("layers")),
        Part("asked", "What was asked", pairs=[(name, str(value)) for name, value in card.facts.items()]),
    ]
    return write_page(path, "Contextual sparsity", f"{card.rule.predictor} · {card.rule.policy}", parts)
