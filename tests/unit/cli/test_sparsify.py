"""sparsify and answer: files, resuming, what is refused, the dry run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import ffnscope
from faults import stop_at
from ffnscope.cli import app
from ffnscope.sparse import fit
from tiny import tokens

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 24, "--max-length", 24, "--device", "cpu")
RULE = ("--predictor", "low_bit", "--predictor-param", "group=8", "--policy", "top_k")


@pytest.fixture
def base(checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("sparsify", checkpoint, "--out", tmp_path / "out", "--target", "recall=0.9", *SMALL, *RULE)


class TestSparsify:
    def test_a_card_that_decodes(self, ok: Ok, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
        result = ok(*base, "--second", "pydoc_topics")
        assert "Asked: recall 0.9, by top_k of the scores of low_bit" in result.stdout
        assert "second text" in result.stdout and "rise of the loss" in result.stdout
        assert "in weights of 16 bits" in result.stdout
        assert all(f"{stage}: " in result.stderr for stage in ("fit and calibrate", "loss with the card"))
        out = tmp_path / "out"
        assert sorted(path.name for path in out.iterdir()) == [
            "card.json",
            "card.png",
            "card.safetensors",
            "report.html",
        ]
        model = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu")).model
        card = ffnscope.read_card(out / "card.json")
        assert card.figures["calibrate"]["recall"].mean >= 0.9 and "second" in card.loss
        dense = model.generate(tokens()[:1], max_new_tokens=4, do_sample=False)
        ffnscope.wrap_(model, card, never_slower=False)
        assert model.generate(tokens()[:1], max_new_tokens=4, do_sample=False).shape == dense.shape
        assert "<svg" in (out / "report.html").read_text()

    def test_a_curve(self, ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
        out = tmp_path / "out"
        asked = (*base, "--curve", 0.25, "--curve", 0.5)
        assert "curve 8 models" in ok(*asked, "--dry-run").stderr
        result = ok(*asked)
        assert "Perplexity at several densities" in result.stdout
        names = {"card.json", "card.png", "card.safetensors", "report.html"}
        names |= {"curve.csv", "curve.json", "curve.png", "curve_bytes.png"}
        assert {path.name for path in out.iterdir()} == names
        rows = json.loads((out / "curve.json").read_text())["rows"]
        own = [row["density"] for row in rows if row["label"] == "low_bit, top_k"]
        assert own == pytest.approx([0.25, 0.5]) and rows[0]["label"] == "dense"
        assert "static mean" in (out / "report.html").read_text()
        ok(*base, "--overwrite")
        assert not list(out.glob("curve*"))
        assert "density of a curve must be in (0, 1)" in fails(2, *base, "--overwrite", "--curve", 30)

    def test_it_goes_on(self, ok: Ok, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, fit, "fit_site", 2)
            assert CliRunner().invoke(app, [str(a) for a in base]).exit_code == 130
        assert (tmp_path / "out" / "sparsify.part").is_dir()
        ok(*base)
        assert not (tmp_path / "out" / "sparsify.part").exists()

    def test_dry_run(self, ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
        told = ok(*base, "--dry-run").stderr
        assert "trace 576 tokens" in told and "GiB of disk" in told and "nothing was computed" in told
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--target", "recall"), "is not MEASURE=VALUE, for example recall=0.95"),
            (("--target", "recal=0.9"), "Unknown target 'recal'. Did you mean 'recall'?"),
            (("--target", "density=0"), "would keep no channel at all"),
            (
                ("--policy", "capped_threshold"),
                "needs k_min; give it in policy_params, or by --policy-param k_min=VALUE",
            ),
            (("--target", "recall=95"), "target recall must be in [0, 1]; got 95"),
            (("--policy", "topk"), "Did you mean 'top_k'?"),
            (("--predictor", "lowbit"), "Did you mean 'low_bit'?"),
            (("--predictor-param", "bits"), "is not NAME=VALUE"),
            (("--failure", 0.2), "no --certify"),
            (("--certify", "conformal"), "Unknown method of a certificate 'conformal'"),
            (("--allocation", "fisher"), "nothing to allocate"),
            (("--second", "sotu"), "is the text of the calibration"),
        ],
    )
    def test_refused(self, fails: Fails, base: tuple[Any, ...], options: tuple[Any, ...], message: str) -> None:
        assert message in fails(2, *base, *options)

    def test_an_output_is_kept(self, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        assert "already exists" in fails(1, *base)


class TestAnswer:
    def test_a_page(self, ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        texts = ("--text", "sotu", "--text", "pydoc_topics", "--held-out-samples", 2)
        result = ok("answer", checkpoint, "--out", out, *texts, *SMALL, "--predictor-param", "group=8")
        assert "Recommended: " in result.stdout
        assert "top-k or threshold, and which k?" in (out / "answer.md").read_text()
        (found,) = out.glob("*.json")
        assert json.loads(found.read_text())["domains"] == ["sotu", "pydoc_topics"]
        assert not (out / "answer.part").exists()

    def test_one_text_is_no_answer(self, fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
        told = fails(2, "answer", checkpoint, "--out", tmp_path / "out", "--text", "sotu", *SMALL)
        assert "compares text domains; got sotu" in told

    def test_perplexity_is_for_sparsify(self, fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
        told = fails(2, "answer", checkpoint, "--out", tmp_path / "out", "--target", "perplexity=+1%", *SMALL)
        assert "--target perplexity is for sparsify" in told

    def test_dry_run(self, ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
        told = ok("answer", checkpoint, "--out", tmp_path / "out", "--dry-run", *SMALL).stderr
        assert told.count("traces of") == 3 and "nothing was computed" in told
        assert not (tmp_path / "out").exists()
