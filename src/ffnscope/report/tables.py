"""Tables of evaluation results: flat rows for CSV and JSON, Markdown, and the same for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ffnscope.display import frame
from ffnscope.errors import UsageError
from ffnscope.types import EvalResult

if TYPE_CHECKING:
    from rich.console import Console

    from ffnscope.evaluate.compare import EvalRow

_MEASURED = ("perplexity", "kl_to_dense", "top1_agreement")
_COLUMNS = (
    *("label", "metric", "dataset", "sparsity_asked", "sparsity"),
    *(f"{name}{end}" for name in _MEASURED for end in ("", "_stderr")),
    *("n_tokens", "protocol"),
)
FLOOR = "random"
BLANK = "–"
LEAST_COLUMN = 12  # characters of a heading that is folded in a narrow terminal
FLOOR_NOTE = f"{FLOOR} is the floor: a metric that does no better has found nothing."


@dataclass(frozen=True, slots=True)
class Panel:
    """The rows of one dataset, arranged as a table.

    Attributes:
        dataset: text that the rows were measured on.
        sparsities: asked sparsities in rising order, 0 for the dense model.
        lines: name of a line (a metric; a row's label where one metric has several rows at one sparsity, and for the
            dense model) -> asked sparsity -> row. Dense first, the floor last.
    """

    dataset: str
    sparsities: tuple[float, ...]
    lines: dict[str, dict[float, EvalRow]]


class Cell(NamedTuple):
    """One cell of a table; ``best`` marks the lowest perplexity of its column."""

    text: str
    best: bool = False


class Grid(NamedTuple):
    """A finished table: Markdown and terminal only differ in how they draw it."""

    title: str
    columns: list[str]
    lines: list[list[Cell]]
    notes: list[str]


def results_rows(rows: Sequence[EvalRow]) -> list[dict[str, Any]]:
    """Flatten evaluation rows for CSV and JSON: one dict of equal keys per row.

    ``perplexity`` has no unit, ``kl_to_dense`` is in nats/token, ``top1_agreement`` is a fraction; a value that a row
    does not have (KL of the dense model to itself) is None. ``n_tokens`` and ``protocol`` are those of the perplexity.
    """
    return [_flat(row) for row in rows]


def results_columns(rows: Sequence[EvalRow]) -> dict[str, list[Any]]:
    """Return the flat rows of `results_rows` as columns: name -> one value per row."""
    flat = results_rows(rows)
    return {name: [row[name] for row in flat] for name in _COLUMNS}


def results_frame(rows: Sequence[EvalRow]) -> Any:
    """Return the flat rows of `results_rows` as a pandas DataFrame; raises UsageError when pandas is not installed."""
    return frame(results_columns(rows))


def results_markdown(rows: Sequence[EvalRow]) -> str:
    """Return Markdown tables, metric x sparsity: perplexity ± standard error, then KL and top-1, per dataset."""
    return "\n".join(grid_markdown(grid) for grid in results_grids(rows))


def grid_markdown(grid: Grid) -> str:
    """Return one table and its notes as Markdown."""

    def row(cells: list[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = f"|{'|'.join(['---', *['---:'] * (len(grid.columns) - 1)])}|"
    body = [row([f"**{c.text}**" if c.best else c.text for c in line]) for line in grid.lines]
    notes = [f"\n{'  '.join(grid.notes)}"] if grid.notes else []
    return "\n".join([f"### {grid.title}", "", row(grid.columns), rule, *body, *notes]) + "\n"


def print_results(rows: Sequence[EvalRow], console: Console) -> None:
    """Print the tables of `results_markdown` in the terminal."""
    for grid in results_grids(rows):
        print_grid(grid, console)
        console.print()


def print_grid(grid: Grid, console: Console) -> None:
    """Print one table and its notes.

    On a narrow terminal, spreads go to a line of their own, and columns that do not fit to a table of their own below,
    with the first column again.
    """
    from rich.text import Text

    for part in _side_by_side(grid, console.width):
        _print_table(part, console)
    for note in grid.notes:
        console.print(Text(note, style="dim"))


def _print_table(grid: Grid, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(grid.title, style="bold"), title_justify="left")
    fits = _terminal_width(grid) <= console.width
    for index, column in enumerate(grid.columns):
        table.add_column(Text(column), justify="right" if index else "left", no_wrap=not index, overflow="fold")
    for line in grid.lines:
        texts = [cell.text if fits or not i else _broken(cell.text) for i, cell in enumerate(line)]
        styles = ["bold green" if cell.best else "" for cell in line]
        table.add_row(*(Text(text, style=style) for text, style in zip(texts, styles, strict=True)))
    console.print(table)


def _side_by_side(grid: Grid, width: int) -> list[Grid]:
    """The grid as tables of as many columns as fit, at least one beside the first."""
    if _terminal_width(grid) <= width or not grid.lines:
        return [grid]
    broken = [[max(map(len, _broken(cell.text).split("\n"))) for cell in line] for line in grid.lines]
    needs = [max(column) for column in zip(*broken, strict=True)]
    needs = [max(need, min(len(name), LEAST_COLUMN)) + 3 for need, name in zip(needs, grid.columns, strict=True)]
    first = max(len(text) for text in (grid.columns[0], *(line[0].text for line in grid.lines))) + 4
    parts: list[list[int]] = [[]]
    for index in range(1, len(grid.columns)):
        if parts[-1] and first + sum(needs[i] for i in (*parts[-1], index)) > width:
            parts.append([])
        parts[-1].append(index)
    return [_columns(grid, (0, *part)) for part in parts]


def _columns(grid: Grid, chosen: Sequence[int]) -> Grid:
    """Some columns of a grid, without its notes."""
    lines = [[line[i] for i in chosen] for line in grid.lines]
    return Grid(grid.title, [grid.columns[i] for i in chosen], lines, [])


def _broken(text: str) -> str:
    return text.replace(" ± ", "\n± ").replace(" / ", " /\n").replace(" (", "\n(")


def panels(rows: Sequence[EvalRow]) -> list[Panel]:
    """Arrange rows as one `Panel` per dataset, in order of appearance.

    Raises:
        UsageError: two rows of one dataset share metric, sparsity and label, so that one would hide the other.
    """
    datasets = dict.fromkeys(row.dataset for row in rows)
    return [_panel(name, [row for row in rows if row.dataset == name]) for name in datasets]


def result(row: EvalRow, name: str) -> EvalResult | None:
    """Return the result of that name, or None when the row does not have it."""
    return next((one for one in row.results if one.name == name), None)


def percent(fraction: float) -> str:
    """Write a fraction as a percentage: 0.2 -> "20 %"."""
    return f"{100 * fraction:.4g} %"


def number(value: float, stderr: float | None = None) -> str:
    """Write a number to four significant digits, with its standard error to the same place: "12.34 ± 0.05"."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}" if stderr is None else f"{value:.2e} ± {stderr:.1e}"
    places = 3 if value == 0 else max(0, min(3, 3 - math.floor(math.log10(abs(value)))))
    text = f"{value:,.{places}f}"
    if stderr is None:
        return text
    return f"{text} ± {stderr:,.{places}f}" if stderr >= 0.5 * 10**-places else f"{text} ± {stderr:.1g}"


def _flat(row: EvalRow) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "label": row.label,
        "metric": row.metric,
        "dataset": row.dataset,
        "sparsity_asked": row.sparsity_asked,
        "sparsity": row.sparsity,
    }
    for name in _MEASURED:
        found = result(row, name)
        flat[name] = found.value if found else None
        flat[f"{name}_stderr"] = found.stderr if found else None
    perplexity = result(row, "perplexity")
    flat["n_tokens"] = perplexity.n if perplexity else None
    flat["protocol"] = perplexity.protocol if perplexity else None
    return flat


def _panel(dataset: str, rows: list[EvalRow]) -> Panel:
    seen = Counter((row.metric, row.sparsity_asked) for row in rows)
    crowded = {metric for (metric, _), n in seen.items() if n > 1}
    lines: dict[str, dict[float, EvalRow]] = {}
    for row in sorted(rows, key=lambda row: (row.metric is not None, row.metric == FLOOR)):
        name = row.label if row.metric is None or row.metric in crowded else row.metric
        line = lines.setdefault(name, {})
        if row.sparsity_asked in line:
            raise UsageError(
                f"two results for {name!r} at sparsity {row.sparsity_asked:g} on {dataset!r}; "
                "give them different labels, or report them apart."
            )
        line[row.sparsity_asked] = row
    return Panel(dataset, tuple(sorted({row.sparsity_asked for row in rows})), lines)


def results_grids(rows: Sequence[EvalRow]) -> list[Grid]:
    """Return the tables of `results_markdown`: perplexity, then KL and top-1, per dataset."""
    found: list[Grid] = []
    for panel in panels(rows):
        found.append(_perplexity_grid(panel))
        if any(result(row, "kl_to_dense") or result(row, "top1_agreement") for row in _rows(panel)):
            found.append(_fidelity_grid(panel))
    return found


def _rows(panel: Panel) -> list[EvalRow]:
    return [row for line in panel.lines.values() for row in line.values()]


def _perplexity_grid(panel: Panel) -> Grid:
    best = _best(panel)

    def cell(name: str, row: EvalRow) -> Cell:
        found = result(row, "perplexity")
        best_here = (name, row.sparsity_asked) in best
        return Cell(BLANK) if found is None else Cell(number(found.value, found.stderr), best_here)

    notes = _protocols(panel, "perplexity")
    if best:
        notes.append("Bold: lowest of its column.")
    if any(row.metric == FLOOR for row in _rows(panel)):
        notes.append(FLOOR_NOTE)
    return _grid(panel, f"Perplexity on {panel.dataset}, by sparsity", cell, notes + _achieved(panel))


def _fidelity_grid(panel: Panel) -> Grid:
    def cell(name: str, row: EvalRow) -> Cell:
        kl, top1 = result(row, "kl_to_dense"), result(row, "top1_agreement")
        if kl is None and top1 is None:
            return Cell(BLANK)
        return Cell(f"{number(kl.value) if kl else BLANK} / {f'{100 * top1.value:.1f} %' if top1 else BLANK}")

    title = f"KL to the dense model (nats/token) / top-1 agreement on {panel.dataset}, by sparsity"
    pruned = {name: line for name, line in panel.lines.items() if not _is_dense(line)}
    sparsities = tuple(sorted({s for line in pruned.values() for s in line}))
    return _grid(Panel(panel.dataset, sparsities, pruned), title, cell, _protocols(panel, "kl_to_dense"))


def _grid(panel: Panel, title: str, cell: Callable[[str, EvalRow], Cell], notes: list[str]) -> Grid:
    lines: list[list[Cell]] = []
    for name, line in panel.lines.items():
        floor = any(row.metric == FLOOR for row in line.values())
        head = Cell(f"{name} (floor)" if floor else name)
        lines.append([head, *(cell(name, line[s]) if s in line else Cell(BLANK) for s in panel.sparsities)])
    return Grid(title, ["metric", *map(percent, panel.sparsities)], lines, notes)


def _best(panel: Panel) -> set[tuple[str, float]]:
    """Line and sparsity of the lowest perplexities, where at least two pruned rows compete."""
    best: set[tuple[str, float]] = set()
    for sparsity in panel.sparsities:
        values: dict[str, float] = {}
        for name, line in panel.lines.items():
            found = result(line[sparsity], "perplexity") if sparsity in line and not _is_dense(line) else None
            values |= {name: found.value} if found else {}
        if len(values) > 1:
            best |= {(name, sparsity) for name, value in values.items() if value == min(values.values())}
    return best


def _is_dense(line: dict[float, EvalRow]) -> bool:
    return all(row.metric is None for row in line.values())


def _protocols(panel: Panel, name: str) -> list[str]:
    found = [one for row in _rows(panel) if (one := result(row, name))]
    return [f"Protocol: {p}; {n:,} tokens." for p, n in dict.fromkeys((one.protocol, one.n) for one in found)]


def _achieved(panel: Panel) -> list[str]:
    """Note where the achieved sparsity is not the asked one (rounding, protected channels)."""
    off: dict[str, list[str]] = {}
    for name, line in panel.lines.items():
        for row in line.values():
            if abs(row.sparsity - row.sparsity_asked) > 5e-4:
                off.setdefault(f"{percent(row.sparsity)} instead of {percent(row.sparsity_asked)}", []).append(name)
    texts = [f"{what} ({', '.join(names)})" for what, names in off.items()]
    return [f"Achieved sparsity: {'; '.join(texts)}."] if texts else []


def _terminal_width(grid: Grid) -> int:
    lines = [grid.columns, *([cell.text for cell in line] for line in grid.lines)]
    return 1 + sum(3 + max(map(len, column)) for column in zip(*lines, strict=True))
