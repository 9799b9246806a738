"""Which ranking to trust: a validation as tables in the terminal or in Markdown, and as strict JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffnscope.analyze.validate import FLOOR, Correlation, RankQuality, Validation
from ffnscope.evaluate.compare import EvalRow
from ffnscope.report.tables import BLANK, FLOOR_NOTE, Cell, Grid, grid_markdown, number, percent, print_grid, result

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("metric", "loss change", "inside FFNs", "token change", "inside FFNs")
HALVES = "(measured, other half of the text)"


def print_validation(found: Validation, console: Console) -> None:
    """Print the tables of `validation_markdown` in the terminal."""
    for grid in _grids(found):
        print_grid(grid, console)
        console.print()


def validation_markdown(found: Validation) -> str:
    """Return Markdown tables: Spearman with measured changes per metric, then perplexity after pruning by each."""
    return "\n".join(grid_markdown(grid) for grid in _grids(found))


def validation_facts(found: Validation) -> dict[str, Any]:
    """Return a validation as plain JSON: rows, the ablated channels with their changes, and what was left out.

    Changes are means over tokens in nats; ``windows`` has the sums of every window (see `Ablation`).
    """
    loss, moved = found.ablation.loss_change(), found.ablation.token_change()
    between = {name: getattr(found.between_halves, name).value for name in _NAMES}
    return {
        "text": found.source,
        "n_tokens": int(found.ablation.n_targets.sum()),
        "rows": found.rows(),
        "between_halves": between,
        "skipped": dict(found.skipped),
        "whole_model_ran_for": list(found.ablation.whole),
        "dense_perplexity": _perplexity(found.dense).value if found.dense else None,
        "ablations": [
            {
                "site": site.name,
                "layer": site.layer,
                "channels": index.tolist(),
                "loss_change": loss[site].tolist(),
                "token_change": moved[site].tolist(),
            }
            for site, index in found.ablation.channels.items()
        ],
    }


_NAMES = ("loss", "loss_within", "token", "token_within")


def _grids(found: Validation) -> list[Grid]:
    return [_quality_grid(found), *([_pruning_grid(found)] if found.dense else [])]


def _quality_grid(found: Validation) -> Grid:
    best = {name: _highest(found, name) for name in _NAMES}
    lines = [
        [Cell(_named(one.metric)), *(_cell(getattr(one, name), best[name]) for name in _NAMES)]
        for one in found.qualities
    ]
    lines.append([Cell(HALVES), *(_cell(getattr(found.between_halves, name), None) for name in _NAMES)])
    n_channels = sum(len(index) for index in found.ablation.channels.values())
    n_tokens = int(found.ablation.n_targets.sum())
    notes = [
        f"{n_channels} channels of {len(found.ablation.channels)} FFNs removed one at a time; {n_tokens:,} tokens.",
        "Loss change: of the mean token NLL, signed. Token change: mean absolute change of a token's NLL.",
        "All channels together, or inside each FFN and averaged. Bold: highest.",
        "In brackets: 95 % intervals over documents, for these channels (jackknife).",
        f"Last row: changes on one half of the documents against those on the other. {FLOOR_NOTE}",
        *(f"No row for {metric}: {why}" for metric, why in found.skipped.items()),
    ]
    if found.ablation.whole:
        names = ", ".join(found.ablation.whole)
        notes.append(f"The whole model ran for every channel of {names}: its first blocks cannot be skipped.")
    return Grid(f"Spearman with measured changes on {found.source}", list(COLUMNS), lines, notes)


def _pruning_grid(found: Validation) -> Grid:
    columns = list(dict.fromkeys((allocator, sparsity) for _, allocator, sparsity in found.pruned))
    values = {key: _perplexity(row).value for key, row in found.pruned.items()}
    lowest = {c: min(v for (_, *rest), v in values.items() if tuple(rest) == c) for c in columns}
    lines: list[list[Cell]] = []
    for one in found.qualities:
        measured = [found.pruned[(one.metric, *column)] for column in columns]
        cells = [_perplexity_cell(row, lowest[c]) for row, c in zip(measured, columns, strict=True)]
        lines.append([Cell(_named(one.metric)), *cells])
    assert found.dense is not None, "drawn only when something was pruned"
    dense = _perplexity(found.dense)
    notes = [
        f"Dense: {number(dense.value, dense.stderr)}; {dense.n:,} tokens. Protocol: {dense.protocol}.",
        "Bold: lowest of its column.",
    ]
    heads = [f"{allocator} {percent(sparsity)}" for allocator, sparsity in columns]
    return Grid(f"Perplexity after pruning on {found.dense.dataset}", ["metric", *heads], lines, notes)


def _named(metric: str) -> str:
    return f"{metric} (floor)" if metric == FLOOR else metric


def _cell(one: Correlation, best: float | None) -> Cell:
    if one.value is None:
        return Cell(BLANK)
    text = f"{one.value:.3f}"
    if one.interval:
        text += f" ({one.interval[0]:.2f} to {one.interval[1]:.2f})"
    return Cell(text, best is not None and one.value == best)


def _highest(found: Validation, name: str) -> float | None:
    every: list[RankQuality] = list(found.qualities)
    return max((v for one in every if (v := getattr(one, name).value) is not None), default=None)


def _perplexity(row: EvalRow) -> Any:
    return result(row, "perplexity")


def _perplexity_cell(row: EvalRow, lowest: float) -> Cell:
    found = _perplexity(row)
    return Cell(number(found.value, found.stderr), found.value == lowest)
