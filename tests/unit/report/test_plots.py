from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from ffnscope.errors import UsageError
from ffnscope.report import plots
from ffnscope.report.summary import rank_correlation
from ffnscope.types import Scores


def check_png(path: Path) -> None:
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert 700 <= width <= 2600 and 250 <= height <= 2000
    assert 0.3 < pixels[..., :3].mean() < 0.99  # neither empty nor black
    assert pixels[..., :3].std() > 0.02


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("n_layers", [1, 30, 80])
def test_score_distributions_of_deep_and_shallow_models(sites, heavy, tmp_path, n_layers):
    scores = heavy("wanda", sites(n_layers))
    core = {site: value.topk(3).indices for site, value in scores.values.items()}
    figure = plots.draw_score_distributions(scores, core, "a model, 65,536 tokens")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert len(axes.patches) == 3 * n_layers
    box = axes.patches[2 * n_layers]  # of layer 0, the middle half of its channels
    first = scores.values[scores.sites[0]].double()
    assert box.get_y() == pytest.approx(float(first.quantile(0.25)))
    assert box.get_y() + box.get_height() == pytest.approx(float(first.quantile(0.75)))
    assert axes.lines[0].get_ydata()[0] == pytest.approx(float(first.max()))
    assert len(axes.get_xticks()) <= 20
    assert figure.get_suptitle() == "wanda: distribution over channels, per layer\na model, 65,536 tokens"
    assert labels(figure)[-2:] == ["median", "core: range, median"]
    check_png(plots.plot_score_distributions(scores, tmp_path / "scores.png", core))


def test_experts_of_a_layer_are_pooled_and_layers_keep_their_index(sites, heavy):
    scores = heavy("wanda", sites(3, experts=4, step=5))
    (axes,) = plots.draw_score_distributions(scores).axes
    pooled = torch.cat([v for site, v in scores.values.items() if site.layer == 5])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "5", "10"]
    assert axes.lines[0].get_ydata()[1] == pytest.approx(float(pooled.max()))


@pytest.mark.parametrize(
    ("change", "scale", "note"),
    [
        (lambda x: x, "linear", ""),
        (lambda x: torch.zeros_like(x), "linear", ""),
        (lambda x: torch.relu(torch.exp(2 * x) - 1), "log", "zeros below the axis"),
        (lambda x: x.sign() * torch.exp(2 * x), "symlog", "linear within"),
        (lambda x: -torch.exp(2 * x), "symlog", "linear within"),
    ],
)
def test_axis_follows_the_values(sites, tmp_path, change, scale, note):
    x = torch.linspace(-3, 3, 64)
    scores = Scores("made by hand", {site: change(x + 10 if scale == "linear" else x) for site in sites(4)})
    (axes,) = plots.draw_score_distributions(scores).axes
    assert axes.get_yscale() == scale
    assert axes.get_ylabel().startswith("score") and note in axes.get_ylabel()
    check_png(plots.plot_score_distributions(scores, tmp_path / "scores.png"))


def test_core_below_the_bands_stays_in_sight(sites, heavy):
    scores = heavy("wanda", sites(3, d_ff=512))
    core = {site: value.argmin()[None] for site, value in scores.values.items()}
    (axes,) = plots.draw_score_distributions(scores, core).axes
    assert axes.get_ylim()[0] < min(float(value.min()) for value in scores.values.values())


def test_natural_values_are_drawn_and_the_best_are_the_lowest(sites, heavy, low_is_keep):
    scores = heavy(low_is_keep, sites(2), change=lambda x: -torch.exp(x))
    (axes,) = plots.draw_score_distributions(scores).axes
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "natural value (low = keep)"
    assert axes.lines[0].get_ydata()[0] == pytest.approx(-float(scores.values[scores.sites[0]].max()))


def test_heatmap_is_log2_of_layer_mean_over_mean(sites, tmp_path):
    a, b = sites(2, d_ff=2)
    scores = {
        "rising": Scores("rising", {a: torch.tensor([1.0, 1.0]), b: torch.tensor([2.0, 4.0])}),
        "negative": Scores("negative", {a: torch.tensor([-1.0, -1.0]), b: torch.tensor([-2.0, -4.0])}),
        "mixed": Scores("mixed", {a: torch.tensor([-1.0, -1.0]), b: torch.tensor([2.0, 4.0])}),
        "partial": Scores("partial", {b: torch.tensor([5.0, 5.0])}),
        "cancelling": Scores("cancelling", {a: torch.tensor([1.0, -1.0]), b: torch.tensor([3.0, -3.0])}),
    }
    figure = plots.draw_heatmap(scores)
    cells = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    row = [-1.0, np.log2(1.5)]
    expected = [row, row, [np.nan, np.log2(3.0)], [np.nan, 0.0], [np.nan, np.nan]]
    np.testing.assert_allclose(cells, expected)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(scores)
    assert "grey" in figure.axes[0].get_xlabel()
    check_png(plots.plot_heatmap(scores, tmp_path / "heatmap.png"))


@pytest.mark.parametrize(("n_layers", "n_metrics"), [(1, 1), (30, 13), (80, 13), (80, 1)])
def test_heatmap_sizes(sites, heavy, tmp_path, n_layers, n_metrics):
    names = [f"metric_with_a_long_name_{i}" for i in range(n_metrics)]
    scores = {name: heavy(name, sites(n_layers), seed=i) for i, name in enumerate(names)}
    assert plots.draw_heatmap(scores).axes[0].images[0].get_array().shape == (n_metrics, n_layers)
    check_png(plots.plot_heatmap(scores, tmp_path / "heatmap.png", "a model"))


def test_heatmap_colours_end_at_sixteen_times(sites):
    values = {site: torch.full((4,), 10.0 ** (-3 * site.layer)) for site in sites(5, d_ff=4)}
    image = plots.draw_heatmap({"steep": Scores("steep", values)}).axes[0].images[0]
    assert image.get_clim() == (-4, 4)
    assert image.colorbar.extend == "min"


def test_perplexity_lines(rows, tmp_path):
    figure = plots.draw_perplexity(rows, "a model")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_title() == "speeches"
    assert labels(figure) == ["random", "wanda", "dense"]  # in the order of the right ends
    dense = axes.lines[0]
    lines = {tuple(line.get_ydata()): line for line in axes.lines}
    assert dense.get_linestyle() == "--" and list(dense.get_ydata()) == [10.0, 10.0]
    assert list(lines[12.34, 100.0].get_xdata()) == [20.0, 50.0]
    assert lines[40.0, 1.25e7].get_color() == plots.GREY and lines[40.0, 1.25e7].get_linestyle() == "--"
    low, high = axes.get_ylim()
    assert low < 10.0 and high > 1.25e7
    assert len(axes.containers) == 2  # error bars
    check_png(plots.plot_perplexity(rows, tmp_path / "perplexity.png"))


def test_an_error_as_large_as_the_perplexity_stays_on_a_logarithmic_axis(row):
    """Bars are one standard error of the mean NLL: their lower end is above 0."""
    figure = plots.draw_perplexity([row(None, 0, 20.0), row("wanda", 0.5, 4000.0, stderr=4100.0)])
    axes = figure.axes[0]
    (segment,) = axes.containers[0].lines[2][0].get_segments()
    assert axes.get_yscale() == "log"
    assert segment[:, 1].tolist() == pytest.approx([4000 * math.exp(-4100 / 4000), 4000 * math.exp(4100 / 4000)])


def test_perplexity_has_a_panel_per_dataset_and_one_look_per_metric(row, tmp_path):
    names = [f"metric_{i}" for i in range(12)]
    rows = [row(None, 0.0, 10.0, dataset=dataset) for dataset in ("speeches", "code")]
    rows += [row(n, 0.2, 11.0 + i, dataset="code", stderr=None, achieved=0.19) for i, n in enumerate(names)]
    rows += [row(n, 0.2, 12.0 + i) for i, n in enumerate(reversed(names))]
    figure = plots.draw_perplexity(rows)
    assert [axes.get_title() for axes in figure.axes] == ["speeches", "code"]
    assert all(axes.get_yscale() == "linear" and list(axes.get_xticks()) == [20.0] for axes in figure.axes)
    drawn = [line for line in figure.axes[1].lines if line.get_marker() not in ("None", "|", "_")]
    assert len(labels(figure)) == 13
    assert list(drawn[0].get_xdata()) == [19.0]  # achieved, not asked
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 12
    check_png(plots.plot_perplexity(rows, tmp_path / "perplexity.png"))


def test_rank_correlation(sites, heavy, tmp_path):
    places = sites(3)
    flat = Scores("flat", {site: torch.ones(site.d_ff) for site in places})
    names, matrix = rank_correlation({"a": heavy("a", places), "b": heavy("b", places, seed=1), "flat": flat})
    (axes, _) = plots.draw_rank_correlation(names, matrix).axes
    cells = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(cells[:2, :2], np.array(matrix)[:2, :2].astype(float))
    assert np.isnan(cells[2]).all() and np.isnan(cells[:, 2]).all()
    assert [text.get_text() for text in axes.texts].count("–") == 5
    assert "-0.00" not in [text.get_text().replace("−", "-") for text in axes.texts]
    check_png(plots.plot_rank_correlation(names, matrix, tmp_path / "correlation.png", "a model"))
    check_png(plots.plot_rank_correlation(["a"], [[1.0]], tmp_path / "one.png"))


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_format_follows_the_suffix(rows, tmp_path, suffix, start):
    path = tmp_path / "new folder" / f"perplexity{suffix}"
    assert plots.plot_perplexity(rows, path) == path
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays


def test_titles_and_names_are_not_read_as_formulas_and_long_titles_wrap(row, tmp_path):
    rows = [row(None, 0.0, 10.0, dataset="$a_$"), row("$b_{", 0.2, 11.0, dataset="$a_$")]
    check_png(plots.plot_perplexity(rows, tmp_path / "p.png", "a very long title " * 12 + "$c_{"))
    assert plots.draw_perplexity(rows, "a very long title " * 12).get_suptitle().count("\n") > 2
    check_png(plots.plot_rank_correlation(["$b_{"], [[1.0]], tmp_path / "r.png"))


def test_refusals(rows, sites, heavy, tmp_path):
    with pytest.raises(
        UsageError, match=r"cannot plot to 'p\.jpg': expected a name that ends in \.png, \.svg, \.pdf\."
    ):
        plots.plot_perplexity(rows, tmp_path / "p.jpg")
    for draw in (
        lambda: plots.draw_perplexity([]),
        lambda: plots.draw_heatmap({}),
        lambda: plots.draw_score_distributions(Scores("wanda", {})),
        lambda: plots.draw_rank_correlation([], []),
    ):
        with pytest.raises(UsageError, match=r"nothing to plot: got no .*; expected at least one"):
            draw()
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match=r"pip install 'ffnscope\[plots\]'"):
        plots.draw_perplexity(rows)


def test_importing_and_plotting_leave_pyplot_alone():
    code = (
        "import sys; from ffnscope.report import plots, summary, tables; "
        "assert not {'matplotlib', 'rich', 'scipy'} & set(sys.modules); "
        "plots.draw_rank_correlation(['a'], [[1.0]]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
