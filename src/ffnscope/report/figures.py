"""Which figures a report shows, in which section, made from a run's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnscope.analyze.concentration import LOSS_PROXY
from ffnscope.apply.profile import judged_on
from ffnscope.report import analysis_plots, plots
from ffnscope.report.card_plot import card_figures
from ffnscope.report.curve_plots import draw_curves, draw_errors
from ffnscope.report.inline_svg import inline_svg
from ffnscope.report.summary import rank_correlation
from ffnscope.report.tables import FLOOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ffnscope.report.run_folder import RunFolder

HALO_STATISTICS: dict[str, str] = {
    "redundancy": "Redundancy of the {} halo with the core",
    "excess": "How much more redundant the {} halo is with the core than the other channels",
}
ACROSS = {
    "bus_dimensions": "Effective number of residual dimensions that the core of each layer writes to: few are a bus",
    "drive": "How strongly what the core writes lies along what the next layer's FFN reads (root mean square)",
    "correlation": "Correlation of the core's activations with those of the next layer's channels (root mean square)",
    "redundancy": "Information in q = h g that the next layer's channels share with the core",
}
MOST_METRICS = 40  # in one page; the rest is in the folder's plots


@dataclass(frozen=True, slots=True)
class PageFigure:
    """A figure of a page: its section, what it shows in one sentence, and the SVG."""

    section: str
    caption: str
    svg: str


def page_figures(run: RunFolder, prefix: str = "f") -> list[PageFigure]:
    """Draw all figures that a run has data for.

    Args:
        run: the run.
        prefix: beginning of their identifiers, unique in the page.

    Raises:
        UsageError: matplotlib is not installed.
    """
    found: list[PageFigure] = []
    for section, caption, figure in _figures(run):
        svg = inline_svg(figure, f"{prefix}{len(found)}", caption)
        found.append(PageFigure(section, caption, svg))
    return found


def _figures(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    yield from _quality(run)
    yield from _widths(run)
    if run.card is not None:
        yield from card_figures(run.card, run.card_curve)
    yield from _scores(run)
    yield from _concentration(run)
    yield from _supernodes(run)
    yield from _ablation(run)
    stages = run.summary.get("stages", {})
    if stages:
        yield (
            "cost",
            "Seconds per stage of the run that made these files, and the peak memory up to its end.",
            analysis_plots.draw_stages(stages),
        )


def _quality(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    if any(row.metric for row in run.rows):
        caption = "Perplexity against the share of channels removed, one line per metric; bars are one standard error."
        yield "quality", caption, plots.draw_perplexity(run.rows)


def _widths(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    rows = run.tables.get("curves", ())
    for label in dict.fromkeys(r["label"] for r in rows):
        caption = f"What cutting one FFN costs, around the solution, and the widths that were chosen by it: {label}."
        yield "widths", caption, draw_curves([r for r in rows if r["label"] == label])
    errors = run.tables.get("error_profile", ())
    for label in dict.fromkeys(r["label"] for r in errors):
        rows = [r for r in errors if r["label"] == label]
        caption = f"Where the damage is: the error of every FFN's output without and with the refit: {label}."
        yield "errors", f"{caption} On {judged_on(rows)}.", draw_errors(rows)


def _scores(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    if not run.scores:
        return
    caption = "Mean score per layer and metric, as a multiple of the metric's own mean: where in the model it is high."
    yield "scores", caption, plots.draw_heatmap(run.scores)
    if len(run.scores) > 1:
        caption = "How alike two metrics rank the channels inside an FFN: Spearman's correlation, mean over FFNs."
        yield "agreement", caption, plots.draw_rank_correlation(*rank_correlation(run.scores))
    for name, one in list(run.scores.items())[:MOST_METRICS]:
        caption = f"Distribution of {name} over the channels of each layer" + (", core marked." if run.core else ".")
        yield "distributions", caption, plots.draw_score_distributions(one, run.core)


def _concentration(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    rows = run.tables.get("concentration", ())
    layers = {r["site"]: r["layer"] for r in rows if r["layer"] is not None}
    names = list(dict.fromkeys(r["metric"] for r in rows if r["top1"] is not None and r["metric"] != FLOOR))
    for metric in sorted(names, key=lambda name: name != LOSS_PROXY)[:3]:
        caption = f"Share of the {metric} mass in the top channels of each FFN; bars are 95 % intervals over documents."
        yield "concentration", caption, analysis_plots.draw_top_mass(rows, metric)
        if metric in run.lorenz.get("curves", {}):
            caption = f"Lorenz curves of {metric}: the share of its mass that the top channels hold."
            yield "concentration", caption, analysis_plots.draw_lorenz(run.lorenz, metric, layers)


def _supernodes(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    rows = run.tables.get("halo", ())
    for halo, statistic in dict.fromkeys((r["halo"], r["statistic"]) for r in rows):
        what = HALO_STATISTICS[statistic].format(halo)
        caption = f"{what}, beside matched nulls; bars hold 95 % of the draws."
        yield "halo", caption, analysis_plots.draw_halo(rows, halo, statistic)
    across = run.tables.get("cross_layer", ())
    for statistic in dict.fromkeys(r["statistic"] for r in across):
        caption = f"{ACROSS[statistic]}; bars hold 95 % of random cores of the same size."
        yield "cross_layer", caption, analysis_plots.draw_cross_layer(across, statistic)


def _ablation(run: RunFolder) -> Iterator[tuple[str, str, Figure]]:
    made: dict[str, tuple[str, Any]] = {
        "ablation": (
            "Loss change when sets of channels are set to zero or to their mean.",
            analysis_plots.draw_ablation,
        ),
        "dose": ("Loss change of random masks against the share of the core in them.", analysis_plots.draw_dose),
    }
    for name, (caption, draw) in made.items():
        if run.tables.get(name):
            yield "ablation", caption, draw(run.tables[name])
