"""Plots of contextual sparsity: points, intervals and cells where the numbers are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ffnscope.errors import UsageError
from ffnscope.evaluate.intervals import Estimate
from ffnscope.report.sparse_plots import HIGHEST, LOWEST, draw_quality, draw_sites, plot_quality, plot_sites
from ffnscope.sparse.evaluation import FormRow
from ffnscope.sparse.measures import Summary
from ffnscope.sparse.site_measures import SITE_MEASURES, OverTokens, SiteMeasures
from ffnscope.types import EvalResult, FFNSite


def row(label, density, ratio, share, half=0.1):
    value = math.log(ratio)
    result = EvalResult("perplexity", 20 * ratio, "1", None, 100, "a text", "windows")
    return FormRow(label, result, Estimate(value, value - half, value + half, 9), density, {}, share * 100, 100.0)


LINES = {
    "oracle": [row("oracle", 0.5, 1.05, 0.83), row("oracle", 0.2, 2.0, 0.73)],
    "CATS": [row("CATS", 0.5, 1.5, 0.67), row("CATS", 0.2, 60.0, 0.47)],
    "4-bit dense FFN": [row("4-bit dense FFN", None, 1.02, 0.28)],
}


def drawn(figure):
    (axes,) = figure.axes
    return axes, [
        line for line in axes.lines if line.get_marker() not in ("None", "v", None) and line.get_markersize() == 4
    ]


class TestQuality:
    def test_lines_against_density_leave_dense_forms_out(self) -> None:
        axes, lines = drawn(draw_quality(LINES, "density", "a model"))
        assert len(lines) == 2
        assert lines[0].get_xdata().tolist() == [20, 50] and lines[0].get_ydata().tolist() == pytest.approx([100, 5])
        assert (
            axes.get_ylim() == (-10, HIGHEST) and axes.get_yscale() == "symlog"
        )  # the interval of 1.05 goes below dense
        assert [text.get_text() for text in axes.get_yticklabels()][:4] == ["-10 %", "-3 %", "-1 %", "0 %"]

    def test_what_is_above_the_axis_is_an_open_mark_at_its_edge(self) -> None:
        axes, lines = drawn(draw_quality(LINES, "density"))
        assert lines[1].get_ydata().tolist() == pytest.approx([HIGHEST, 50])
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "^"] == [[20.0]]
        better = {"a": [row("a", 0.5, 0.5, 0.5), row("a", 0.2, 1.1, 0.2)]}
        axes, lines = drawn(draw_quality(better, "density"))
        assert lines[0].get_ydata().tolist() == pytest.approx([10, LOWEST])
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "v"] == [[50.0]]

    def test_the_axis_is_as_long_as_needed_and_shows_what_is_better_than_dense(self) -> None:
        close = {"a": [row("a", 0.5, 0.99, 0.5, half=0.001), row("a", 0.2, 1.02, 0.2, half=0.001)]}
        axes, lines = drawn(draw_quality(close, "density"))
        assert axes.get_ylim() == (-3, 3) and lines[0].get_ydata().tolist() == pytest.approx([2, -1])
        worse = {"a": [row("a", 0.5, 1.5, 0.5)]}
        assert draw_quality(worse, "density").axes[0].get_ylim() == (0, 100)

    def test_bytes_have_them_and_intervals_are_of_the_ratio(self) -> None:
        axes, lines = drawn(draw_quality(LINES, "bytes_share"))
        assert [line.get_xdata().tolist() for line in lines] == [[73, 83], [47, 67], [pytest.approx(28)]]
        ends = axes.collections[-1].get_segments()[0][:, 1]
        assert ends.tolist() == pytest.approx([100 * (1.02 * math.exp(edge) - 1) for edge in (-0.1, 0.1)])
        names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
        assert names == list(LINES)

    def test_a_row_has_the_same_colour_against_either_cost(self) -> None:
        dense_first = dict(reversed(LINES.items()))
        _, by_density = drawn(draw_quality(dense_first, "density"))
        _, by_bytes = drawn(draw_quality(dense_first, "bytes_share"))
        assert [one.get_color() for one in by_bytes[1:]] == [one.get_color() for one in by_density]
        assert len({one.get_color() for one in by_bytes}) == 3

    def test_refusals(self, tmp_path) -> None:
        with pytest.raises(UsageError, match="nothing to plot"):
            draw_quality({"4-bit dense FFN": LINES["4-bit dense FFN"]}, "density")
        with pytest.raises(UsageError, match="cost must be"):
            draw_quality(LINES, "time")
        assert plot_quality(LINES, "bytes_share", tmp_path / "a.png").stat().st_size > 10_000


def sites(values, n_tokens=10, experts=1):
    found = []
    for layer, value in enumerate(values):
        for expert in range(experts):
            site = FFNSite(
                layer, f"layers.{layer}.mlp", None, "up", "down", 4, 20, expert=expert if experts > 1 else None
            )
            one = OverTokens(Summary(value + expert, 0.0, 1.0), Estimate(value, None, None, 1))
            found.append(SiteMeasures(site, n_tokens * (expert + 1), dict.fromkeys(SITE_MEASURES, one)))
    return found


class TestSites:
    def test_cells(self, tmp_path) -> None:
        rows = {"oracle": sites([0.1, 0.2, 0.3]), "CATS": sites([0.4, 0.5])}
        axes = draw_sites(rows, "missed_mass", "a model").axes[0]
        cells = axes.images[0].get_array()
        assert np.ma.filled(cells, -1).tolist() == [[0.1, 0.2, 0.3], [0.4, 0.5, -1]]
        assert [t.get_text() for t in axes.get_yticklabels()] == ["oracle", "CATS"]
        assert [t.get_text() for t in axes.texts] == ["0.10", "0.20", "0.30", "0.40", "0.50"]
        assert plot_sites(rows, "recall", tmp_path / "a.svg").exists()

    def test_experts_are_averaged_by_their_tokens(self) -> None:
        axes = draw_sites({"a": sites([0.0, 3.0], experts=2)}, "recall").axes[0]
        assert axes.images[0].get_array().tolist() == [[pytest.approx(2 / 3), pytest.approx(3 + 2 / 3)]]

    def test_many_layers_have_no_numbers(self) -> None:
        axes = draw_sites({"a": sites([0.1] * 40)}, "density_ratio").axes[0]
        assert not axes.texts and len(axes.get_xticks()) == 20

    def test_refusals(self) -> None:
        with pytest.raises(UsageError, match="measure must be one of density, recall"):
            draw_sites({"a": sites([0.1])}, "missed")
        with pytest.raises(UsageError, match="nothing to plot"):
            draw_sites({"a": []}, "recall")
