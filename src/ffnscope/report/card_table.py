"""A sparsity card for readers: tables for the terminal and Markdown, and a page with its curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffnscope.report.card_plot import draw_card
from ffnscope.report.figures import PageFigure
from ffnscope.report.inline_svg import inline_svg
from ffnscope.report.page import Part, write_page
from ffnscope.report.tables import BLANK, Cell, Grid, number, print_grid
from ffnscope.sparse.card import Figure, SiteCard, SparsityCard

if TYPE_CHECKING:
    from rich.console import Console

SOURCES = {"calibrate": "calibration documents", "test": "test documents", "second": "second text"}
MEASURES = ("recall", "precision", "density", "missed_mass", "relative_error")
CAPTION = (
    "Recall, density and missed mass of every FFN, means over tokens, on documents that had no part in the card and, "
    "where one was given, on a second text."
)


def card_grids(card: SparsityCard) -> list[Grid]:
    """What was realised in all FFNs together, what it does to the loss, and the parameters FFN by FFN."""
    grids = [_realised(card), *([_loss(card)] if card.loss else []), _sites(card)]
    return grids


def card_sentences(card: SparsityCard) -> list[str]:
    """What was asked, what is promised, and what is read."""
    measure, value = card.target
    asked = f"perplexity +{value:.2%}" if measure == "perplexity" else f"{measure.replace('_', ' ')} {value:g}"
    n_dense = sum(one.dense for one in card.sites)
    found = [
        f"Asked: {asked}, by {card.rule.policy} of the scores of {card.rule.predictor}.",
        f"A token reads {card.bytes_read / 2**20:,.2f} MiB of FFNs and predictors, "
        f"{card.bytes_read / card.bytes_dense:.1%} of the dense FFNs."
        + (f" {n_dense} of {len(card.sites)} FFNs stay dense, where that is less to read." if n_dense else ""),
    ]
    if card.certificate is not None:
        found.append(f"Certified: {card.certificate.statement}.")
    if reason := card.allocation.get("reason"):
        found.append(f"Densities: {reason}.")
    return found


def print_card(card: SparsityCard, console: Console) -> None:
    """Print the card in the terminal."""
    from rich.text import Text

    for sentence in card_sentences(card):
        console.print(Text(sentence))
    for grid in card_grids(card):
        console.print()
        print_grid(grid, console)


def write_card_page(path: Path, card: SparsityCard) -> Path:
    """Write the card as one HTML file that needs nothing else; returns ``path``.

    Raises:
        UsageError: matplotlib is not installed.
        ArtifactError: the file cannot be written.
    """
    svg = inline_svg(draw_card(card), "c0", CAPTION)
    realised, *rest = card_grids(card)
    parts = [
        Part("found", "What was found", card_sentences(card), [realised, *rest[:-1]]),
        Part("layers", "FFN by FFN", [], rest[-1:], [PageFigure("layers", CAPTION, svg)]),
        Part("asked", "What was asked", pairs=[(name, str(value)) for name, value in card.facts.items()]),
    ]
    return write_page(path, "Contextual sparsity", f"{card.rule.predictor} · {card.rule.policy}", parts)


def _realised(card: SparsityCard) -> Grid:
    lines = [
        [Cell(SOURCES[source]), *(Cell(_figure(figures.get(name))) for name in MEASURES)]
        for source, figures in card.figures.items()
    ]
    notes = [
        "Means over tokens of all FFNs ± standard error over documents; in brackets the 5th and 95th percentile of "
        "documents."
    ]
    return Grid("Realised", ["on", *(name.replace("_", " ") for name in MEASURES)], lines, notes)


def _figure(found: Figure | None) -> str:
    if found is None:
        return BLANK
    error = "" if found.stderr is None else f" ± {number(found.stderr)}"
    return f"{number(found.mean)}{error}\n({number(found.p5)} – {number(found.p95)})"


def _loss(card: SparsityCard) -> Grid:
    lines = [
        [
            Cell(SOURCES[source]),
            Cell(number(one.dense)),
            Cell(number(one.sparse)),
            Cell(_rise(one.difference, one.stderr)),
        ]
        for source, one in card.loss.items()
    ]
    notes = ["Prompts are sparse here too; rise in nats per token ± standard error over documents."]
    return Grid("Perplexity", ["on", "dense", "sparse", "rise of the loss"], lines, notes)


def _rise(value: float, stderr: float | None) -> str:
    return f"{value:+.4f}" + ("" if stderr is None else f" ± {number(stderr)}")


def _sites(card: SparsityCard) -> Grid:
    columns = ["FFN", "parameter", "density", "recall (test)", "missed mass (test)", "bytes of dense"]
    return Grid("Parameters", columns, [_site(one) for one in card.sites], [])


def _site(one: SiteCard) -> list[Cell]:
    test = one.figures.get("test", {})
    seen = [number(test[name].mean) if name in test else BLANK for name in ("recall", "missed_mass")]
    parameter = "dense" if one.parameter is None else number(one.parameter)
    share = f"{one.bytes_read / one.bytes_dense:.1%}"
    return [Cell(text) for text in (one.site.name, parameter, f"{one.density:.3f}", *seen, share)]
