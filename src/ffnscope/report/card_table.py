"""A sparsity card in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffnscope.report.tables import BLANK, Cell, Grid, number, print_grid
from ffnscope.sparse.card import Figure, SiteCard, SparsityCard, target_words
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.evaluation import FormRow

if TYPE_CHECKING:
    from rich.console import Console

SOURCES = {"calibrate": "calibration documents", "test": "test documents", "second": "second text"}
BYTES = f"Bytes are those of {UNIT}, whatever the model was loaded in, predictors included."
DENSE = "what the target asks for would read no less there, predictor included, or nothing sparse meets it"
MEASURES = ("recall", "precision", "density", "missed_mass", "relative_error", "missed_mass_gap")


def card_grids(card: SparsityCard) -> list[Grid]:
    """What was realised in all FFNs together, what it does to the loss, and the parameters FFN by FFN."""
    grids = [_realised(card), *([_loss(card)] if card.loss else []), _sites(card)]
    return grids


def card_sentences(card: SparsityCard) -> list[str]:
    """What was asked, what is promised, and what is read."""
    n_dense = sum(one.dense for one in card.sites)
    found = [
        f"Asked: {target_words(*card.target)}, by {card.rule.policy} of the scores of {card.rule.predictor}.",
        f"A token reads {card.bytes_read / 2**20:,.2f} MiB of FFNs and predictors in {UNIT}, "
        f"{card.bytes_read / card.bytes_dense:.1%} of the dense FFNs in the same."
        + (f" {n_dense} of {len(card.sites)} FFNs stay dense: {DENSE}." if n_dense else ""),
    ]
    if n_dense == len(card.sites):
        found.append("So this card changes nothing. Allow more loss, or choose a predictor that reads less.")
    if card.rule.prompt:
        found.append(
            f"The selection is that of each prompt: give it by begin_prompt before generating. Here the first "
            f"{card.rule.prompt} tokens of each window are its prompt, which all figures leave out."
        )
    if card.certificate is not None:
        found.append(f"Certified: {card.certificate.statement}.")
    if "asked" in card.allocation:
        found.append(_allocation(card.allocation))
    return found


def _allocation(facts: Mapping[str, Any]) -> str:
    """What an allocation was measured to do, and whether it is used."""
    names = ("uniform_perplexity", "allocated_perplexity", "loss_difference")
    uniform, allocated, difference = (facts[name] for name in names)
    rise = _rise(difference, facts["stderr"])
    used = "it is used" if facts["used"] == facts["asked"] else "it is not used, being not clearly lower"
    return (
        f"Densities by {facts['asked']}: perplexity {number(allocated)} on calibration documents, {number(uniform)} "
        f"with one density for all at the same bytes ({rise} nats per token), so {used}."
    )


def curve_grid(rows: Sequence[FormRow]) -> Grid:
    """Perplexity and cost of everything that a curve measured."""
    columns = ["FFNs by", "density", "bytes of dense", "perplexity", "rise of the loss"]
    notes = [
        "On the test documents; one density for all FFNs, except in the card. Rise in nats per token, in brackets its "
        "95 % interval over documents. The oracle reads gate and up in full to choose. " + BYTES
    ]
    return Grid("Perplexity at several densities", columns, [_curve_row(row) for row in rows], notes)


def print_card(card: SparsityCard, console: Console, curve: Sequence[FormRow] = ()) -> None:
    """Print the card, and a curve where one was measured, in the terminal."""
    from rich.text import Text

    for sentence in card_sentences(card):
        console.print(Text(sentence))
    for grid in [*card_grids(card), *([curve_grid(curve)] if curve else [])]:
        console.print()
        print_grid(grid, console)


def _realised(card: SparsityCard) -> Grid:
    lines = [
        [Cell(SOURCES[source]), *(Cell(_figure(figures.get(name))) for name in MEASURES)]
        for source, figures in card.figures.items()
    ]
    notes = [
        "Means over tokens of all FFNs ± standard error over documents; in brackets the 5th and 95th percentile of "
        "documents. Missed mass gap: what is missed more than by as many channels with the largest contributions."
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
    prompt = card.facts.get("prompt", 0)
    read = (
        f"The first {prompt} tokens of each window run dense and do not count"
        if prompt
        else "Prompts are sparse here too"
    )
    notes = [f"{read}; rise in nats per token ± standard error over documents."]
    return Grid("Perplexity", ["on", "dense", "sparse", "rise of the loss"], lines, notes)


def _rise(value: float, stderr: float | None) -> str:
    return f"{value:+.4f}" + ("" if stderr is None else f" ± {number(stderr)}")


def _curve_row(row: FormRow) -> list[Cell]:
    density = BLANK if row.density is None else f"{row.density:.3f}"
    rise, one = BLANK, row.difference
    if one is not None:
        ends = "" if one.low is None or one.high is None else f"\n({one.low:+.4f} – {one.high:+.4f})"
        rise = f"{one.value:+.4f}{ends}"
    texts = (row.label, density, f"{row.bytes_share:.1%}", number(row.perplexity.value), rise)
    return [Cell(text) for text in texts]


def _sites(card: SparsityCard) -> Grid:
    columns = ["FFN", "parameter", "density", "recall (test)", "missed mass (test)", "bytes of dense"]
    return Grid("Parameters", columns, [_site(one) for one in card.sites], [BYTES])


def _site(one: SiteCard) -> list[Cell]:
    test = one.figures.get("test", {})
    seen = [number(test[name].mean) if name in test else BLANK for name in ("recall", "missed_mass")]
    parameter = "dense" if one.parameter is None else number(one.parameter)
    share = f"{one.bytes_read / one.bytes_dense:.1%}"
    return [Cell(text) for text in (one.site.name, parameter, f"{one.density:.3f}", *seen, share)]
