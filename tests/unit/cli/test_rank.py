"""The command rank: channels in the order of a metric."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.analyze import levels
from ffnscope.io import read_json
from ffnscope.registry import METRICS
from ffnscope.report.ranking import ranking
from tiny import D_FF, LAYERS

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")


@pytest.fixture
def base(checkpoint: Path, texts: Path) -> tuple[Any, ...]:
    return ("rank", checkpoint, "--text", texts / "train.txt", *SMALL)


@pytest.fixture(scope="module")
def scored(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of two metrics that need no text."""
    loaded = ffnscope.load_model(str(checkpoint))
    sites = ffnscope.find_sites(loaded.model)
    path = tmp_path_factory.mktemp("scored") / "scores.safetensors"
    ffnscope.write_scores(path, [ffnscope.score(loaded.model, sites, n) for n in ("magnitude", "random")], {})
    return path


def printed(result: Result) -> list[list[str]]:
    """Cells of the table's rows."""
    lines = [line for line in result.stdout.splitlines() if re.match(r"│ +\d", line) or re.match(r"│ \d", line)]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_table_of_the_most_important_channels(ok: Ok, base: tuple[Any, ...], checkpoint: Path, texts: Path) -> None:
    result = ok(*base, "-m", "wanda", "--top", 7)
    loaded = ffnscope.load_model(str(checkpoint))
    source = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=4, length=32, seed=42)
    stats = ffnscope.calibrate(loaded.model, windows, ["wanda"])
    expected = ranking(ffnscope.score(loaded.model, stats, "wanda"), 7)
    assert [[row[1], row[2], row[5]] for row in printed(result)] == [
        [str(row["layer"]), str(row["channel"]), row["site"]] for row in expected
    ]
    assert printed(result)[0][4] == f"{(D_FF - 1) / D_FF:.1%}"


def test_the_default_is_the_loss_proxy(ok: Ok, base: tuple[Any, ...]) -> None:
    result = ok(*base)
    assert "scar_loss_proxy" in result.stdout
    assert len(printed(result)) == 20


def test_lowest_and_tracked(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    options = (*base, "-m", "activation_l2_norm", "--tracked", "model.layers.[1-1].mlp.up_proj")
    rows = printed(ok(*options, "--lowest", "--top", 5, "--out", tmp_path / "low.csv"))
    assert {row[1] for row in rows} == {"1"}
    assert rows[0][4] == "0.0%"
    with (tmp_path / "low.csv").open(newline="") as file:
        values = [float(row["value"]) for row in csv.DictReader(file)]
    assert values == sorted(values)
    assert len(values) == D_FF
    assert f"{values[0]:.4g}" == rows[0][3]


def test_all_rows_as_csv_and_json(ok: Ok, fails: Fails, scored: Path, tmp_path: Path) -> None:
    options = ("rank", "--scores", scored, "-m", "magnitude", "--top", 3)
    ok(*options, "--out", tmp_path / "new" / "rank.json")
    value = read_json(tmp_path / "new" / "rank.json")
    assert value["metric"] == "magnitude"
    found = ffnscope.read_scores(scored)[0]["magnitude"]
    assert value["rows"] == ranking(found)
    assert len(value["rows"]) == LAYERS * D_FF
    ok(*options, "--out", tmp_path / "rank.csv")
    with (tmp_path / "rank.csv").open(newline="") as file:
        assert [int(row["channel"]) for row in csv.DictReader(file)] == [row["channel"] for row in value["rows"]]
    assert "already exists" in fails(1, *options, "--out", tmp_path / "rank.csv")
    ok(*options, "--out", tmp_path / "rank.csv", "--overwrite")


def test_scores_of_a_file(ok: Ok, scored: Path) -> None:
    one = ok("rank", "--scores", scored, "-m", "random", "--tracked", "layers.0.mlp", "--top", 100)
    assert "calibrate" not in one.stderr
    assert len(printed(one)) == D_FF
    assert {row[1] for row in printed(one)} == {"0"}


@pytest.mark.usefixtures("two_passes")
def test_a_metric_that_needs_the_core_takes_two_passes(
    ok: Ok, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, passes = levels.calibrate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs.get("core"))
        return real(*args, **kwargs)

    monkeypatch.setattr(levels, "calibrate", counted)
    rows = printed(ok(*base, "-m", "supernode_protection_score", "--core-fraction", 0.1, "--top", 10))
    assert [core is None for core in passes] == [True, False]
    core = {(site.layer, int(c)) for site, index in passes[1].items() for c in index}
    assert len(core) == LAYERS * round(0.1 * D_FF)
    assert {(int(row[1]), int(row[2])) for row in rows} == core  # the core comes first


def test_a_reference_model(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path / "before", seed=1)
    rows = printed(ok(*base, "-m", "delta_alignment", "--reference", reference))
    assert all(float(row[3]) > 0 for row in rows)


def test_parameters(ok: Ok, base: tuple[Any, ...]) -> None:
    options = (*base, "-m", "composite", "--param", "composite.parts={wanda: 1.0, magnitude: 0.5}")
    ranks, z = (ok(*options, "--param", f"composite.normalise={how}").stdout for how in ("rank", "z"))
    assert "composite" in ranks
    assert ranks != z


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--top", "0"], "--top must be at least 1 row; got 0."),
        (["--out", "rank.txt"], "--out rank.txt must end in .csv or .json."),
        (["-m", "wandas"], "Did you mean 'wanda'?"),
        (["--scores", "s"], "give either a model to score, or --scores FILE."),
        (["-m", "delta_alignment"], "'delta_alignment' needs the model before fine-tuning: give --reference MODEL."),
        (["-m", "wanda", "--reference", "x"], "--reference x would do nothing: no metric here reads it."),
        (["-m", "wanda", "--core-fraction", "0.1"], "--core-fraction would do nothing: no metric here reads the"),
        (["-m", "supernode_protection_score", "--core-fraction", "2"], "core fraction must be in (0, 1]"),
        (["-m", "composite", "--param", "composite.parts={wandas: 1.0}"], "Unknown metric 'wandas'. Did you mean"),
        (["-m", "composite", "--param", "composite.parts={composite: 1.0}"], "'composite' cannot be a part of comp"),
        (["-m", "composite", "--param", "composite.parts={wanda: x}"], "expected a number; got 'x'"),
    ],
)
def test_refused_before_a_model_is_loaded(
    fails: Fails, texts: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], text: str
) -> None:
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    assert text in fails(2, "rank", checkpoint, "--text", texts / "train.txt", *options)


def test_refused_scores(fails: Fails, scored: Path, tmp_path: Path) -> None:
    assert "give either a model to score, or --scores FILE." in fails(2, "rank")
    assert "holds scores of magnitude, random; 'wanda' is not" in fails(2, "rank", "--scores", scored, "-m", "wanda")
    options = ("rank", "--scores", scored, "-m", "magnitude")
    useless = ("--text", "sotu", "--param", "random.seed=1", "--dtype", "float32")
    assert "--text, --param, --dtype would do nothing with --scores" in fails(2, *options, *useless)
    assert "matches no FFN" in fails(2, *options, "--tracked", "nothing")
    assert "does not exist" in fails(1, "rank", "--scores", tmp_path / "none")


def test_a_reference_of_another_shape_is_refused_before_the_calibration(
    fails: Fails, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_checkpoint(tmp_path / "wider", intermediate_size=64)
    monkeypatch.setattr(levels, "calibrate", None)
    written = fails(2, *base, "-m", "delta_alignment", "--reference", other)
    assert "the reference model has (64, 32) at model.layers.0.mlp; expected (48, 32)" in written


def test_equal_weights_have_no_delta(ok: Ok, base: tuple[Any, ...], checkpoint: Path) -> None:
    rows = printed(ok(*base, "-m", "delta_alignment", "--reference", checkpoint))
    assert torch.tensor([float(row[3]) for row in rows]).eq(0).all()


def test_pipelines_by_name_with_their_parameters(ok: Ok, base: tuple[Any, ...], fails: Fails) -> None:
    chained = "weighted_pagerank_chained"
    off, alone, on = (
        [row[1:3] for row in printed(ok(*base, "-m", name, *options))]
        for name, options in (
            (chained, ("--param", f"{chained}.gamma=0.0", "--param", f"{chained}.theta=1.0")),
            ("write_norm", ()),
            (chained, ("--param", f"{chained}.gamma=1.0")),
        )
    )
    assert off == alone != on
    assert "gamma of weighted PageRank must be in [0, 1]; got 3" in fails(
        2, *base, "-m", chained, "--param", f"{chained}.gamma=3"
    )
    ok(*base, "-m", "layerwise_modified_pagerank", "--param", "layerwise_modified_pagerank.z_importance=true")


OWN_SCORER = '''
from ffnscope import BaseScorer, scorer

@scorer("{0}")
class Own(BaseScorer):
    """Sizes of outputs, to a power."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def score(self, prev_importance, in_activations, out_activations, weight):
        return out_activations**self.power
'''


def test_a_scorer_of_ones_own_by_name(
    ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METRICS, "_items", {name: METRICS.get(name) for name in METRICS.names()})
    (tmp_path / "ranks_by_me.py").write_text(OWN_SCORER.format("by_me"))
    own = ("--module", "ranks_by_me")
    found, expected = (
        printed(ok(*base, *options))
        for options in ((*own, "-m", "by_me_chained", "--param", "by_me_chained.power=1"), ("-m", "write_norm"))
    )
    assert [row[1:3] for row in found] == [row[1:3] for row in expected]
    assert "by_me_chained power=1.0" in ok("metrics", *own).stdout
    pruned = (
        "prune",
        *base[1:],
        *own,
        "-m",
        "by_me",
        "--sparsity",
        0.25,
        "--no-evaluate",
        "--out",
        tmp_path / "smaller",
    )
    ok(*pruned)
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    assert "module 'ranks_by_you' cannot be imported: No module named 'ranks_by_you'" in fails(
        2, *base, "-m", "by_me", "--module", "ranks_by_you"
    )


@pytest.mark.parametrize(
    ("metric", "param", "text"),
    [
        ("weighted_pagerank", "gamma=2", "gamma of weighted PageRank must be in [0, 1]; got 2."),
        ("layerwise_weighted_pagerank_chained", "theta=-1", "theta of weighted PageRank must be in [0, 1]; got -1."),
        ("modified_pagerank", "sparsity=30", "sparsity of z_importance must be in [0, 1]"),
        ("magnitude", "p=0.5", "the order p of a norm must be at least 1; got 0.5."),
        ("layerwise_norm", "p=0.5", "the order p of a norm must be at least 1; got 0.5."),
        ("graph_katz", "attenuation=3", "attenuation must be in (0, 1]"),
        ("graph_hub", "iterations=0", "iterations must be at least 1; got 0."),
        ("graph_pagerank", "damping=1", "damping must be in [0, 1)"),
        ("graph_katz", "strength=engy", "got 'engy'. Did you mean 'energy'?\n"),
    ],
)
def test_impossible_parameters_are_refused_before_a_model_is_loaded(
    fails: Fails, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, metric: str, param: str, text: str
) -> None:
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    assert text in fails(2, *base, "-m", metric, "--param", f"{metric}.{param}")
