"""The report of a run as one HTML file that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from ffnscope.analyze.nulls import SIGNIFICANT
from ffnscope.io import write_text
from ffnscope.report.card_table import card_grids, card_sentences, curve_grid
from ffnscope.report.figures import PageFigure, page_figures
from ffnscope.report.findings import caveats, findings, is_significant
from ffnscope.report.run_folder import RunFolder, described
from ffnscope.report.tables import Cell, Grid, number, results_grids
from ffnscope.report.task_table import task_grid

MOST_ROWS = 200  # of an analysis table; the file beside the report has all


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, and what each model wrote after it."""

    prompt: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Part:
    """One section of a page."""

    id: str
    heading: str
    sentences: list[str] = field(default_factory=list[str])
    grids: list[Grid] = field(default_factory=list[Grid])
    figures: list[PageFigure] = field(default_factory=list[PageFigure])
    samples: list[Sample] = field(default_factory=list[Sample])
    pairs: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.sentences or self.grids or self.figures or self.samples or self.pairs)


def write_report(run: RunFolder, path: Path) -> Path:
    """Write the report of one run; returns ``path``.

    Raises:
        UsageError: matplotlib is not installed.
        ArtifactError: the file cannot be written.
    """
    model = run.summary["model"]
    subtitle = (
        f"{model['model_id']} · {model['parameters']:,} parameters · ffnscope {run.summary['versions']['ffnscope']}"
    )
    return write_page(path, run.name, subtitle, run_parts(run))


def write_page(path: Path, title: str, subtitle: str, parts: list[Part]) -> Path:
    """Write a page of the parts that have something to show; returns ``path``."""
    from jinja2 import Environment

    source = files("ffnscope.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    shown = [part for part in parts if not part.is_empty]
    write_text(path, template.render(title=title, subtitle=subtitle, parts=shown) + "\n")
    return path


def run_parts(run: RunFolder, prefix: str = "f") -> list[Part]:
    """The sections of one run's report; ``prefix`` begins the identifiers of its figures."""
    by_section: dict[str, list[PageFigure]] = {}
    for figure in page_figures(run, prefix):
        by_section.setdefault(figure.section, []).append(figure)

    def drawn(*names: str) -> list[PageFigure]:
        return [figure for name in names for figure in by_section.get(name, ())]

    return [
        Part("found", "What was found", findings(run)),
        Part("quality", "Dense and pruned", grids=results_grids(run.rows), figures=drawn("quality")),
        Part("widths", "Where the widths come from", figures=drawn("widths")),
        Part("errors", "Layer error profile", figures=drawn("errors")),
        Part("contextual", "Contextual sparsity", *_of_card(run), figures=drawn("curve", "layers")),
        Part("tasks", "Downstream tasks", grids=[task_grid(run.tasks)] if run.tasks else []),
        Part("samples", "Samples", samples=list(_samples(run.samples))),
        Part("scores", "Scores by layer", figures=drawn("scores")),
        Part("concentration", "Concentration", grids=list(_pooled(run)), figures=drawn("concentration")),
        Part("supernodes", "Core and halo", grids=list(_of_core(run)), figures=drawn("halo", "cross_layer")),
        Part("ablation", "Ablation", grids=list(_ranking(run)), figures=drawn("ablation")),
        Part("agreement", "Do the metrics agree?", figures=drawn("agreement")),
        Part("distributions", "Distribution of every score", figures=drawn("distributions")),
        Part("cost", "Time and memory", figures=drawn("cost")),
        Part("limits", "What limits these numbers", caveats(run)),
        Part("asked", "What was asked", pairs=list(_asked(run))),
    ]


def _of_card(run: RunFolder) -> tuple[list[str], list[Grid]]:
    """Sentences and tables of a sparsity card."""
    if run.card is None:
        return [], []
    *grids, sites = card_grids(run.card)
    return card_sentences(run.card), [*grids, *([curve_grid(run.card_curve)] if run.card_curve else []), sites]


def _samples(found: Mapping[str, Any]) -> Iterator[Sample]:
    texts: Mapping[str, list[str]] = found.get("texts", {})
    for index, prompt in enumerate(found.get("prompts", ())):
        yield Sample(prompt, [(label, written[index]) for label, written in texts.items()])


def _pooled(run: RunFolder) -> Iterator[Grid]:
    rows = [r for r in run.tables.get("concentration", ()) if r["site"] == "all"]
    columns = {
        "top1": "top 1 %",
        "top5": "top 5 %",
        "top10": "top 10 %",
        "gini": "Gini",
        "participation": "participation",
    }
    if rows:
        lines = [[Cell(r["metric"]), *(Cell(_with_bounds(r, key)) for key in columns), Cell(_tail(r))] for r in rows]
        yield Grid(
            "All FFNs pooled",
            ["metric", *columns.values(), "tail exponent"],
            lines,
            [
                "Share of the mass in the top channels; in brackets: 95 % interval over documents. Tail: exponent of a "
                "power law, in brackets the channels that it is fitted to."
            ],
        )


def _with_bounds(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return "–"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return number(row[key]) + ("" if low is None or high is None else f"\n({number(low)} – {number(high)})")


def _tail(row: Mapping[str, Any]) -> str:
    if row.get("tail_exponent") is None:
        return "–"
    return f"{number(row['tail_exponent'])}\n(top {row['tail_n']:,}, from {number(row['tail_from'])})"


def _of_core(run: RunFolder) -> Iterator[Grid]:
    rows = run.tables.get("core_overlap", ())
    others = list(dict.fromkeys(r["other"] for r in rows))
    if others:
        lines: list[list[Cell]] = []
        for other in others:
            of = [r for r in rows if r["other"] == other and r["site"] != "all"]
            jaccard = sorted(r["jaccard"] for r in of)
            more = sum(map(is_significant, of))
            middle = f"{jaccard[len(jaccard) // 2]:.2f} ({jaccard[0]:.2f} – {jaccard[-1]:.2f})"
            lines.append([Cell(other.replace("_", " ")), Cell(middle), Cell(f"{more} of {len(of)}")])
        columns = [
            "top channels by",
            "Jaccard with the core: median (range)",
            f"FFNs beyond chance (p < {SIGNIFICANT:g})",
        ]
        yield Grid(
            "Overlap of the core", columns, lines, ["p: hypergeometric, corrected for the number of FFNs (Holm)."]
        )


def _ranking(run: RunFolder) -> Iterator[Grid]:
    rows = run.tables.get("ranking_quality", ())
    if rows:
        lines = [
            [Cell(r["metric"]), *(Cell(_with_bounds(r, k)) for k in ("spearman_loss", "spearman_token"))] for r in rows
        ]
        columns = ["metric", "Spearman with the loss change", "with the tokens' absolute loss change"]
        yield Grid("Every metric against single-channel ablation", columns, lines, [])


def _asked(run: RunFolder) -> Iterator[tuple[str, str]]:
    yield from flat_config(run.config)
    yield from flat_config({"versions": run.summary.get("versions", {}), "texts": run.summary.get("texts", {})})


def flat_config(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value in one line) of a nested mapping."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from flat_config(cast("Mapping[str, Any]", inner), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", described(inner)
