"""Tables and plots of a validation, from one made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from ffnscope.analyze.ablation import Ablation
from ffnscope.analyze.paths import ChannelNode, ChannelPath
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.validate import Validation, ValidationOptions, join_validation, validation_plans
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.report import validation_plots
from ffnscope.report.drawing import new_figure
from ffnscope.report.layered_graph import draw_layered_graph, plot_layered_graph
from ffnscope.report.validation_plots import (
    draw_measured,
    draw_percolation,
    draw_rank_quality,
    draw_score_scatter,
    plot_validation,
)
from ffnscope.report.validation_table import print_validation, validation_facts, validation_markdown

METRICS_SHOWN = ("wanda", "magnitude", "random")


@pytest.fixture
def made(sites, heavy, row) -> Validation:
    """Three metrics on 8 of 30 layers, 6 documents, two sparsities, two allocators."""
    every = sites(30)
    scores = {name: heavy(name, every, seed) for seed, name in enumerate(METRICS_SHOWN)}
    channels = ChannelSample(64, 8).draw(scores["wanda"])
    random = torch.Generator().manual_seed(0)
    change = {
        s: scores["wanda"].values[s][index].double()[:, None] * torch.randn(len(index), 6, generator=random)
        for s, index in channels.items()
    }
    moved = {s: 2 * value.abs() for s, value in change.items()}
    counts = torch.full((6,), 10)
    ablation = Ablation(channels, change, moved, torch.ones(6), counts, torch.arange(6), (every[0].name,))
    plans = validation_plans(scores, ValidationOptions(sparsities=(0.2, 0.5)))
    rows = [row(None, 0.0, 10.0)]
    for i, (name, allocator, sparsity) in enumerate(plans):
        rows.append(row(name, sparsity, 12.0 + i, label=f"{name} {allocator} {sparsity}"))
    windows = contiguous_windows(torch.zeros(6, 11, dtype=torch.int64), "speeches")
    return join_validation(scores, ablation, plans, rows, windows)


def test_tables(made):
    text = validation_markdown(made)
    assert "| metric | loss change | inside FFNs | token change | inside FFNs |" in text
    assert "64 channels of 8 FFNs removed one at a time; 60 tokens." in text
    assert "| random (floor) |" in text and "(measured, other half of the text)" in text
    assert "| metric | local 20 % | local 50 % | global 20 % | global 50 % |" in text
    assert "The whole model ran for every channel of layers.0.mlp" in text
    best = next(line for line in text.splitlines() if line.startswith("| wanda |"))
    assert "**" in best  # the token changes follow it
    console = Console(width=200, record=True)
    print_validation(made, console)
    assert "random (floor)" in console.export_text()


def test_facts_are_strict_json(made):
    value = json.loads(json.dumps(validation_facts(made), allow_nan=False))
    assert value["dense_perplexity"] == 10.0
    assert len(value["ablations"]) == 8
    first = next(iter(made.ablation.loss_change().values()))
    assert value["ablations"][0]["loss_change"] == pytest.approx(first.tolist())
    assert value["between_halves"].keys() == {"loss", "loss_within", "token", "token_within"}


def test_frames_and_notebooks(made):
    pandas = pytest.importorskip("pandas")
    table = made.to_pandas()
    assert isinstance(table, pandas.DataFrame) and list(table["metric"])[-1] == "random"
    assert "spearman_loss" in made._repr_html_()


def check_png(path: Path) -> None:
    pixels = imread(path)
    assert 0.3 < pixels[..., :3].mean() < 0.995
    assert pixels[..., :3].std() > 0.02


def test_all_plots_are_drawn(made, tmp_path):
    paths = plot_validation(made, tmp_path, "a model")
    assert [path.name for path in paths] == ["rank_quality.png", "measured.png", "scores.png", "percolation.png"]
    for path in paths:
        check_png(path)


def test_rank_quality_shows_values_and_intervals(made):
    left, right = draw_rank_quality(made).axes
    assert [label.get_text() for label in left.get_yticklabels()] == [one.metric for one in made.qualities]
    dots = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([one.token.value for one in made.qualities])


def test_percolation_is_the_rise_over_the_dense_loss(made):
    figure = draw_percolation(made)
    assert [axes.get_title() for axes in figure.axes] == ["local", "global"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(names) == set(METRICS_SHOWN) and names[-1] == "random"
    first = figure.axes[0].lines[names.index("wanda")]
    expected = [torch.tensor(value / 10).log().item() for value in (12.0, 13.0)]
    assert first.get_ydata() == pytest.approx(expected, rel=1e-5)
    assert first.get_xdata() == pytest.approx([20.0, 50.0])


def test_labels_of_percolation_can_be_read():
    axes = new_figure(4, 4, "", "").add_subplot()
    axes.plot([10.03, 50.0], [-0.02, 0.3])
    axes.plot([10.03, 50.0], [1e-9, 0.1])
    validation_plots._rise_axes(axes, [10.03, 50.0])
    assert [axes.xaxis.get_major_formatter()(x) for x in axes.get_xticks()] == ["10 %", "50 %"]
    assert axes.get_yscale() == "symlog" and axes.yaxis.get_transform().linthresh == 0.01


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0.5, 0.9, ["0.6", "0.9"]), (0.3, 5.0, ["", ""]), (0.01, 90.0, ["", ""])],
)
def test_a_narrow_axis_of_percolation_is_labelled_between_the_powers_of_ten(low, high, labels):
    axes = new_figure(4, 4, "", "").add_subplot()
    axes.plot([10.0, 50.0], [low, high])
    validation_plots._rise_axes(axes, [10.0, 50.0])
    label = axes.yaxis.get_minor_formatter()
    assert [label(0.6), label(0.9)] == labels
    assert label(0.5) == ("" if high > 50 else "0.5")
    sizes = {tick.label1.get_size() for tick in [*axes.yaxis.get_minor_ticks(), *axes.yaxis.get_major_ticks()]}
    assert sizes == {8.0}


def test_scatter_of_two_scores(sites, heavy):
    a, b = heavy("wanda", sites(4), 0), heavy("magnitude", sites(4), 0)
    figure = draw_score_scatter(a, b)
    assert figure.get_suptitle().startswith("wanda and magnitude, Spearman 1.00")
    assert figure.axes[0].get_xscale() == "log"
    assert len(figure.axes[0].collections[0].get_offsets()) == 4 * 64
    wide = draw_score_scatter(heavy("wanda", sites(30, d_ff=1500)), heavy("magnitude", sites(30, d_ff=1500), 1))
    assert len(wide.axes[0].collections[0].get_offsets()) == 15_000
    with pytest.raises(UsageError, match="scored different FFNs"):
        draw_score_scatter(a, heavy("magnitude", sites(3)))


def test_measured_has_a_dot_per_channel(made):
    figure = draw_measured(made, "wanda")
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes[:2]] == [64, 64]


def nodes_and_paths(n_layers: int, per_layer: int = 6) -> tuple[list[ChannelNode], list[ChannelPath]]:
    random = torch.Generator().manual_seed(1)
    nodes = [
        ChannelNode(layer, int(torch.randint(1536, (1,), generator=random)), float(torch.rand(1, generator=random)))
        for layer in range(n_layers)
        for _ in range(per_layer)
    ]
    pairs = [(a, b) for a in nodes for b in nodes if a.layer < b.layer]
    chosen = torch.randperm(len(pairs), generator=random)[:60].tolist()
    strength = torch.rand(len(chosen), generator=random).sort(descending=True).values.tolist()
    return nodes, [ChannelPath(*pairs[i], s) for i, s in zip(chosen, strength, strict=True)]


@pytest.mark.parametrize("n_layers", [2, 30, 80])
def test_layered_graph(tmp_path, n_layers):
    nodes, paths = nodes_and_paths(n_layers)
    figure = draw_layered_graph(nodes, paths, "a model")
    axes = figure.axes[0]
    assert len(axes.patches) == len(paths)
    assert len(axes.collections[0].get_offsets()) == len(nodes)
    numbers = [text.get_text() for text in axes.texts]
    assert len(numbers) == (len(nodes) if n_layers <= 40 else 0)
    check_png(plot_layered_graph(nodes, paths, tmp_path / "graph.png"))


def test_the_best_channel_of_a_layer_is_on_top():
    nodes = [ChannelNode(0, 5, 0.1), ChannelNode(0, 6, 0.9), ChannelNode(3, 7, 0.5)]
    axes = draw_layered_graph(nodes, []).axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[0, -1], [0, 0], [1, 0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3"]
    with pytest.raises(UsageError, match="nothing to plot: got no channels"):
        draw_layered_graph([], [])


def test_without_pruning_there_is_no_percolation(made):
    import dataclasses

    with pytest.raises(UsageError, match="nothing was pruned, so there is no loss to draw"):
        draw_percolation(dataclasses.replace(made, dense=None))
