"""The HTML report: complete, self-contained, of the files alone; and comparisons of runs."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint, write_texts
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.io import write_json
from ffnscope.report.comparison import comparison_grids, comparison_rows, labelled, write_comparison
from ffnscope.report.findings import caveats, findings
from ffnscope.report.page import write_report
from ffnscope.report.run_folder import read_run, result_files
from ffnscope.run import config_from_dict
from runs import quiet_run, small_run
from tiny import LAYERS

METRICS = ["random", "activation_l2_norm", "wanda"]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Checks that elements close in order; collects identifiers, links and text of headings."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.links += [value or ""] if name in ("href", "src", "xlink:href") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open if tag in VOID else self.open[:-1]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(path: Path) -> Outline:
    found = Outline()
    found.feed(path.read_text())
    found.close()
    assert not found.open
    return found


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "llama")
    texts = write_texts(tmp_path_factory.mktemp("texts"))

    def run(name: str, **changes: Any) -> Path:
        blocks = {
            "pruning": {"algorithms": METRICS},
            "output": {"report": True},
            "metrics": {"scar": {"enabled": False}},
        }
        out = tmp_path_factory.mktemp("out") / name
        config = small_run(model, texts, out, **{**blocks, "experiment": {"name": name}, **changes})
        return quiet_run(config_from_dict(config)).folder

    return run


@pytest.fixture(scope="module")
def folder(make: Callable[..., Path]) -> Path:
    return make("<first> & only")


@pytest.fixture
def analysed(folder: Path, tmp_path: Path) -> Path:
    """The run with rows of every analysis beside it."""
    found = tmp_path / "run"
    shutil.copytree(folder, found)
    sites = [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    bounds = {
        f"{k}_{e}": v
        for k in ("top1", "top5", "top10", "gini", "participation")
        for e, v in (("low", 0.2), ("high", 0.4))
    }
    masses = {"top1": 0.3, "top5": 0.35, "top10": 0.4, "gini": 0.3, "participation": 0.3, **bounds}
    tail = {"tail_exponent": 2.5, "tail_low": 2.0, "tail_high": 3.0, "tail_from": 0.1, "tail_n": 12}
    tables: dict[str, list[dict[str, Any]]] = {
        "concentration": [
            {"metric": "scar_loss_proxy", "site": s, "layer": i, "n_channels": 48, **masses, **tail}
            for s, i in [*zip(sites, range(LAYERS), strict=True), ("all", None)]
        ],
        "core_overlap": [
            {"site": s, "layer": i, "other": o, "n_core": 4, "n_other": 4, "shared": 1, "expected": 0.3,
             "jaccard": 0.14, "p": 0.01, "p_adjusted": 0.02}
            for i, s in enumerate(sites)
            for o in ("activation_outliers", "wanda")
        ],
        "halo": [
            {"halo": h, "null": n, "statistic": t, "site": s, "layer": i, "n_halo": 5,
             "value": 0.2, "null_mean": 0.1, "null_sd": 0.01, "null_low": 0.05, "null_high": 0.15, "draws": 200,
             "effect": 3.0, "p": 0.005, "p_adjusted": 0.01, "tokens": 100,
             "null_overlap": 0.4 if n == "lp_matched" else 0.1}
            for h in ("write", "read")
            for t in ("redundancy", "excess")
            for n in ("random_core", "lp_matched")
            for s, i in [*zip(sites, range(LAYERS), strict=True), ("all", None)]
        ],
        "cross_layer": [
            {"site": s, "next_site": None, "layer": i, "statistic": "bus_dimensions", "value": 3.0, "null_mean": 5.0,
             "null_sd": 1.0, "null_low": 4.0, "null_high": 6.0, "draws": 200, "p": 0.01, "p_adjusted": 0.02}
            for i, s in enumerate(sites)
        ],
        "ablation": [
            {"set": c, "how": how, "site": "all", "layer": None, "n_channels": 8, "draw": 0, "loss_change": 0.3,
             "stderr": 0.1, "n_targets": 90, "documents": 3}
            for c in ("core", "lp_matched")
            for how in ("zero", "mean")
        ],
        "dose": [
            {"core_share": c, "sparsity": 0.5, "draw": d, "loss_change": 1 + c + d / 10, "stderr": 0.1}
            for c in (0.0, 0.5, 1.0)
            for d in (0, 1)
        ],
        "protection": [
            {"dataset": "a text", "sparsity": 0.5, "first": "supernode_protection_score-0.5",
             "second": "scar_loss_proxy-0.5", "loss_difference": -0.2, "stderr": 0.15, "perplexity_first": 30.0,
             "perplexity_second": 36.0, "documents": 4, "n_targets": 90}
        ],
        "ranking_quality": [
            {"metric": m, "spearman_loss": v, "spearman_loss_low": None, "spearman_loss_high": None,
             "spearman_token": v, "spearman_token_low": v - 0.1, "spearman_token_high": v + 0.1}
            for m, v in (("wanda", 0.5), ("random", 0.0))
        ],
    }  # fmt: skip
    sentence = "The top 1 % of the channels of each FFN hold a median 30.0 % of its scar_loss_proxy mass."
    facts = {"concentration": {"medians": {"scar_loss_proxy": {"sentence": sentence}}}}
    for name, rows in tables.items():
        write_json(found / "analysis" / f"{name}.json", {"rows": rows, "facts": facts.get(name, {})})
    curves = {"scar_loss_proxy": {name: [0.0, 0.3, 1.0] for name in (*sites, "all")}}
    write_json(found / "analysis" / "lorenz.json", {"fractions": [0.0, 0.01, 1.0], "curves": curves})
    return found


def test_a_run_writes_its_report(folder: Path) -> None:
    page = outline(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert {"What was found", "Dense and pruned", "Samples", "What limits these numbers", "Time and memory"} <= set(
        page.headings
    )
    assert "<h1>&lt;first&gt; &amp; only</h1>" in text and "<first>" not in text
    assert text.count("<svg ") == text.count("</svg>") == 4 + len(METRICS)
    assert len(page.ids) == len(set(page.ids)), "two elements share an identifier"
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links if not link.startswith("data:"))
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, "the page needs a network"
    assert "<script" not in text


def test_values_on_hover(folder: Path) -> None:
    titles = re.findall(r"<title>([^<]+)</title>", (folder / "report.html").read_text())
    assert any(re.fullmatch(r"wanda, 25 % removed: perplexity [\d.,]+ ± [\d.]+", t) for t in titles)
    assert any(t.startswith("wanda, layer 0: ") and t.endswith("times the metric&#x27;s mean") for t in titles)
    assert any(t.startswith("random and wanda: ") for t in titles)
    assert any(t.startswith("calibrate: ") for t in titles)


def test_the_report_of_the_files_alone_is_the_same(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = (copy / "report.html").read_text()
    for path in copy.rglob("*"):
        if path.is_file() and path not in result_files(copy):
            path.unlink()
    assert write_report(read_run(copy), copy / "report.html").read_text() == before


def test_every_analysis_has_its_figure_and_its_sentence(analysed: Path) -> None:
    run = read_run(analysed)
    said = " ".join(findings(run))
    assert "hold a median 30.0 % of its scar_loss_proxy mass." in said
    assert "25 % of the core are activation outliers too (median over FFNs; 7.5 % would be by chance)" in said
    assert (
        "The write halo shares 0.200 nats with the core per channel, mean over FFNs; its nulls share: random core"
        in said
    )
    assert f"corrected for their number, is that of {LAYERS} of {LAYERS} (random core)" in said
    assert "Random masks that hold 0 % of the core cost 1.050 nats/token more" in said and "100 % of it 2.050" in said
    assert "Of 2 metrics, wanda ranks the sampled channels" in said and "(Spearman 0.50)" in said
    assert "is 0.200 ± 0.150 nats/token below that of scar_loss_proxy-0.5 on a text, within the error." in said
    text = write_report(run, analysed / "again.html").read_text()
    for caption in (
        "Share of the scar_loss_proxy mass", "Lorenz curves of scar_loss_proxy", "Redundancy of the write halo",
        "Redundancy of the read halo", "residual dimensions that the core of each layer writes to",
        "when sets of channels are set to zero",
        "against the share of the core in them",
    ):  # fmt: skip
        assert f"{caption}" in html.unescape(text), caption
    assert text.count("<svg ") == 4 + len(METRICS) + 9
    assert "Overlap of the core" in text and "All FFNs pooled" in text
    outline(analysed / "again.html")


def test_stability_cross_layer_and_ablation_are_told(analysed: Path) -> None:
    run = read_run(analysed)
    shift = {"site": "all", "layer": None, "shared": 2.0, "n_core": 4}
    across = {"site": "all", "layer": None, "null_mean": 5.0, "p": 0.01}
    tables = {
        **run.tables,
        "core_stability": [{**shift, "compared": c, "jaccard": j} for c, j in (("halves", 0.25), ("seed 7", 0.5))],
        "cross_layer": [{**across, "statistic": n, "value": v} for n, v in (("bus_dimensions", 3.0), ("drive", 9.0))],
    }
    said = findings(dataclasses.replace(run, tables=tables))
    for sentence in (
        "The cores of two halves of the documents have a Jaccard overlap of 0.25 (median over FFNs).",
        "The core and that of seed 7 have a Jaccard overlap of 0.50 (median over FFNs).",
        "The core writes to 3.000 effective residual dimensions, mean over FFNs; random cores of its size: 5.000",
        "The core drives what the next FFN reads by 9.000, mean over FFNs; random cores of its size: 5.000",
        "Without the 8 channels of the core the loss rises by 0.300 ± 0.100 nats/token; without lp matched (8",
    ):
        assert any(one.startswith(sentence) for one in said), sentence


def test_caveats_name_what_is_left_out_and_what_rests_on_little(analysed: Path) -> None:
    run = read_run(analysed)
    facts = {"halo": {"few_tokens": {"a": 30, "b": 20}, "refused": dict.fromkeys("abcd", "no token reached it")}}
    said = caveats(dataclasses.replace(run, facts=facts))
    assert "Halo leaves out a, b, c and 1 more: no token reached it." in said
    few = next(s for s in said if s.startswith("Correlations with the core of 2 FFNs rest on fewer than 10 tokens"))
    assert "(the fewest: 20)" in few
    own = "sets for the {} halo hold 40 % of the halo's own channels"
    assert [s.split(",")[0] for s in said if "own channels" in s] == [
        f"Lp matched {own.format(halo)}" for halo in ("write", "read")
    ]


def test_a_sample_of_blanks_is_told_as_nothing(analysed: Path) -> None:
    run = read_run(analysed)
    samples = {"prompts": ["Once"], "texts": {"dense": ["upon a time"], "random-0.5": [" \n"]}}
    text = write_report(dataclasses.replace(run, samples=samples), analysed / "again.html").read_text()
    assert "<b>random-0.5</b>(nothing)" in text and "<b>dense</b>upon a time" in text


def test_caveats_name_what_is_little(folder: Path) -> None:
    said = " ".join(caveats(read_run(folder)))
    assert "Scores come from 192 tokens of" in said and "Perplexities are of" in said
    assert "are fewer than 4 per channel" not in said  # 192 tokens, 4 x 48 channels


def test_two_runs_side_by_side(make: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    other = make("second", calibration={"seed": 7})
    runs = labelled([read_run(folder), read_run(other)])
    titles = [grid.title for grid in comparison_grids(runs)]
    assert titles[0] == "What was asked otherwise" and titles[-1] == "Do the runs rank channels alike?"
    asked = {line[0].text: [c.text for c in line[1:]] for line in comparison_grids(runs)[0].lines}
    assert asked["calibration.seed"] == ["42", "7"] and "output.dir" not in asked
    rows = comparison_rows(runs)
    assert {row["run"] for row in rows} == set(runs) and len({tuple(row) for row in rows}) == 1
    page = outline(write_comparison(runs, tmp_path / "both.html"))
    assert page.headings[0] == "Side by side" and len(page.ids) == len(set(page.ids))


def test_runs_that_cannot_be_compared(folder: Path) -> None:
    one = read_run(folder)
    for runs in ([one], [one, one]):
        with pytest.raises(UsageError, match="at least two runs, each folder once"):
            labelled(runs)


def test_what_is_no_finished_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="none is not a folder; expected the output folder"):
        read_run(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"holds no run \(no summary.json\)"):
        read_run(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "ledger.json").touch()
    with pytest.raises(ArtifactError, match=r"holds a run that is not finished .* run it again"):
        read_run(begun)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "pruning_results.json").write_text('{"rows": [')
    with pytest.raises(ArtifactError, match=r"pruning_results.json cannot be read as JSON"):
        read_run(damaged)
