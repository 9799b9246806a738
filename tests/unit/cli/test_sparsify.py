"""sparsify and answer: files, resuming, what is refused, the dry run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import ffnscope
from checkpoints import write_documents
from faults import stop_at
from ffnscope.cli import answer as answer_module
from ffnscope.cli import app
from ffnscope.run import sparse_steps
from ffnscope.sparse import fit
from tiny import tokens

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 24, "--max-length", 24, "--device", "cpu")
RULE = ("--predictor", "low_bit", "--predictor-param", "group=8", "--policy", "top_k")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    (tmp_path / "documents").mkdir()
    return write_documents(tmp_path / "documents")


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
        assert "9 models x" in ok(*asked, "--dry-run").stdout
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
        ok(*base, "--overwrite", "--curve", 0.5, "--against", "CATS", "--against", "3-bit dense FFN")
        rows = json.loads((out / "curve.json").read_text())["rows"]
        labels = [row["label"] for row in rows]
        assert labels == ["dense", "low_bit, top_k", "CATS", "3-bit dense FFN", "the card"]
        assert "Did you mean 'CATS'?" in fails(2, *base, "--overwrite", "--curve", 0.5, "--against", "CAT")
        assert "--against would do nothing with no --curve" in fails(2, *base, "--overwrite", "--against", "CATS")

    def test_it_goes_on(self, ok: Ok, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, fit, "fit_site", 2)
            assert CliRunner().invoke(app, [str(a) for a in base]).exit_code == 130
        assert (tmp_path / "out" / "sparsify.part").is_dir()
        ok(*base)
        assert not (tmp_path / "out" / "sparsify.part").exists()

    def test_damaged_traces_and_another_text_are_told(
        self, ok: Ok, base: tuple[Any, ...], documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = documents / "train.jsonl"
        asked = (*base, "--text", path)
        with monkeypatch.context() as patch:
            stop_at(patch, fit, "fit_site", 2)
            assert CliRunner().invoke(app, [str(a) for a in asked]).exit_code == 130
            (traces,) = (tmp_path / "out" / "sparsify.part").glob("traces_*")
            file = traces / "site_0001.safetensors"
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
            stop_at(patch, fit, "fit_site", 1)
            told = CliRunner().invoke(app, [str(a) for a in asked]).stderr
            assert "site_0001.safetensors is damaged" in told and "are deleted, and made again" in told
            assert "changed since" not in told
        path.write_text(path.read_text().upper())
        assert "changed since the interrupted call: the calibration text; what depends on that" in ok(*asked).stderr

    def test_dry_run(self, ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
        told = ok(*base, "--dry-run").stdout
        assert "576 tokens" in told and "GiB of disk" in told and "nothing was computed" in told
        assert "unknown" not in told and re.search(r"memory by stage: contextual [\d.]+ GiB", told)
        assert "it fits" in told
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--target", "recall"), "is not MEASURE=VALUE, for example recall=0.95"),
            (("--target", "recal=0.9"), "Unknown target 'recal'. Did you mean 'recall'?"),
            (("--target", "perplxity=+1%"), "Unknown target 'perplxity'. Did you mean 'perplexity'?"),
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
            (("--floor", 0.2), "would do nothing with --allocation uniform"),
            (("--wanted", 1), "wanted must be in [0, 1)"),
            (("--max-traces", 0), "--max-traces must be a positive number of GiB"),
            (("--target", "parameter=nan"), "the parameter of the policy must be finite"),
        ],
    )
    def test_refused(self, fails: Fails, base: tuple[Any, ...], options: tuple[Any, ...], message: str) -> None:
        assert message in fails(2, *base, *options)

    def test_an_output_is_kept(self, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        assert "already exists" in fails(1, *base)


class TestPredictors:
    """Trained predictors go out to files and come back; progress is told; what is impossible is refused at once."""

    @pytest.mark.parametrize(
        ("status", "params", "message"),
        [
            (1, ("static", "plan=nowhere.json"), "nowhere.json does not exist"),
            (1, ("fc_files", "folder=nowhere"), "nowhere does not exist"),
            (2, ("fc_files", "folder=.", "layer=1"), "layer of predictor 'fc_files' is found for each FFN"),
            (2, ("low_bit", "bits=16"), "bits must be in [2, 8]"),
            (2, ("low_rank", "rank=0"), "rank must be in [1, 32] for model.layers.0.mlp; got 0"),
            (2, ("low_rank", "rank={model.layers.7.mlp: 3}"), "Unknown FFN in rank of predictor 'low_rank'"),
            (2, ("low_rank", "epochs=-1"), "epochs must be positive; got -1"),
            (2, ("griffin", "prompt=23"), "a prompt of 23 tokens leaves nothing to predict in windows of 24"),
        ],
    )
    def test_refused_before_any_work(
        self,
        fails: Fails,
        checkpoint: Path,
        documents: Path,
        tmp_path: Path,
        status: int,
        params: tuple[str, ...],
        message: str,
    ) -> None:
        given = [part for one in params[1:] for part in ("--predictor-param", one)]
        text = ("--text", documents / "train.jsonl", *SMALL, "--dry-run")
        told = fails(status, "sparsify", checkpoint, "--out", tmp_path / "o", *text, "--predictor", params[0], *given)
        assert message in told

    @pytest.mark.parametrize(
        ("policy", "params", "target"),
        [("top_k", (), "parameter=1.5"), ("nucleus", (), "parameter=3"), ("bank_top_k", ("size=0",), "recall=0.9")],
    )
    def test_policies_refused_before_any_work(
        self, fails: Fails, checkpoint: Path, documents: Path, policy: str, params: tuple[str, ...], target: str
    ) -> None:
        given = [part for one in params for part in ("--policy-param", one)]
        text = ("--text", documents / "train.jsonl", *SMALL, "--dry-run", "--target", target)
        told = fails(2, "sparsify", checkpoint, "--out", documents / "o", *text, "--policy", policy, *given)
        assert "must be" in told

    def test_traces_are_bounded(self, fails: Fails, checkpoint: Path, documents: Path) -> None:
        text = ("--text", documents / "train.jsonl", *SMALL, "--max-traces", 1e-6)
        told = fails(2, "sparsify", checkpoint, "--out", documents / "o", *text, "--predictor-param", "group=8")
        assert "or raise it (--max-traces GIB, contextual.max_traces)" in told

    def test_list(self, ok: Ok) -> None:
        told = ok("predictors", "list").stdout
        assert "low_rank rank=128 relu=True lookahead=0 density=that of the target, or 0.3 loss=mass" in told
        assert "griffin prompt=32" in told and "low_bit bits=4 group=64" in told
        assert "hybrid core=0.02 rest=nucleus" in told and "kept=" not in told
        assert "exact_gate up_size=True norm=True" in told and "norm=None" not in told and "layer=" not in told

    def test_out_and_in(
        self, ok: Ok, fails: Fails, checkpoint: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sparse_steps, "QUIET_SECONDS", 0.0)
        small = ("--text", documents / "train.jsonl", *SMALL, "--policy", "top_k", "--target", "density=0.4")
        trained, out = tmp_path / "trained", tmp_path / "fc"
        params = ("rank=4", "epochs=2", "loss=published")
        given = [part for one in params for part in ("--predictor-param", one)]
        told = ok("sparsify", checkpoint, "--out", trained, *small, "--predictor", "low_rank", *given).stderr
        assert "train the predictor of model.layers.1.mlp: epoch 2 of at most 2, missed mass" in told
        card = ("--card", trained / "card.json")
        export = ("predictors", "export", checkpoint, "--device", "cpu", "--out", out)
        left = tmp_path / f".fc.{'0' * 32}.tmp"  # of a process that was killed
        left.mkdir()
        assert "2 predictors of what is before the norm" in ok(*export, *card).stdout
        assert not list(tmp_path.glob(".fc.*"))
        assert {path.name for path in out.iterdir()} == {"model_0.pt", "model_1.pt"}
        assert "is not empty" in fails(1, *export, *card)
        files = ("--predictor", "fc_files", "--predictor-param", f"folder={out}")
        ok("sparsify", checkpoint, "--out", tmp_path / "again", *small, *files)
        first, second = (ffnscope.read_card(tmp_path / name / "card.json") for name in ("trained", "again"))
        recalls = [one.figures["test"]["recall"].mean for one in (first, second)]
        assert recalls[0] == pytest.approx(recalls[1], abs=1e-3)
        ok("sparsify", checkpoint, "--out", tmp_path / "plain", *small, "--predictor-param", "group=8")
        plain = ("--card", tmp_path / "plain" / "card.json")
        assert "only trained ones can be exported" in fails(2, *export, *plain, "--out", tmp_path / "more")


class TestAnswer:
    def test_a_page(self, ok: Ok, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut off after a model was answered, it is not answered again."""
        out = tmp_path / "out"
        texts = ("--text", "sotu", "--text", "pydoc_topics", "--held-out-samples", 2)
        asked = ("answer", checkpoint, "--out", out, *texts, *SMALL, "--predictor-param", "group=8")
        with monkeypatch.context() as patch:
            stop_at(patch, answer_module, "write_text", 1)
            first = CliRunner().invoke(app, [str(argument) for argument in asked])
        assert first.exit_code == 130 and "Recommended: " in first.stdout
        with monkeypatch.context() as patch:
            patch.setattr(answer_module, "answer", lambda *args, **kwargs: 1 / 0)
            assert "was answered before the interrupt: " in ok(*asked).stderr
        assert "top-k or threshold, and which k?" in (out / "answer.md").read_text()
        (found,) = out.glob("*.json")
        told = json.loads(found.read_text())
        assert told["domains"] == ["sotu", "pydoc_topics"] and told["made_from"]["seed"] == 42
        assert told["made_from"]["texts"]["sotu"]["perplexity"]["windows"] == 2
        weights = told["made_from"]["model"]["weights_hash"][:16]
        assert f"weights {weights} in float32; seed 42" in (out / "answer.md").read_text()
        assert not (out / "answer.part").exists()

    def test_one_text_is_no_answer(self, fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
        told = fails(2, "answer", checkpoint, "--out", tmp_path / "out", "--text", "sotu", *SMALL)
        assert "compares text domains; got sotu" in told

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ("--predictor", "griffin"),
                "griffin takes its scores from a prompt. Choose another predictor, or sparsify",
            ),
            (
                ("--predictor", "low_rank", "--predictor-param", "lookahead=1"),
                "low_rank reads the input of another FFN",
            ),
            (("--predictor-param", "grup=8"), "Did you mean 'group'?"),
            (("--wanted", 1.5), "wanted must be in (0, 1)"),
            (("--held-out-samples", 0), "--held-out-samples must be at least 1; got 0"),
            (("--target", "parameter=3"), "--target parameter=3 is for sparsify"),
            (("--max-traces", -1), "--max-traces must be a positive number of GiB"),
        ],
    )
    def test_refused(
        self, fails: Fails, checkpoint: Path, tmp_path: Path, options: tuple[Any, ...], message: str
    ) -> None:
        assert message in fails(2, "answer", checkpoint, "--out", tmp_path / "out", *SMALL, *options)

    def test_a_model_twice(self, fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
        told = fails(2, "answer", checkpoint, f"{checkpoint}/", "--out", tmp_path / "out", *SMALL)
        assert "is given twice, or another MODEL has the same file name" in told

    def test_perplexity_is_for_sparsify(self, fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
        told = fails(2, "answer", checkpoint, "--out", tmp_path / "out", "--target", "perplexity=+1%", *SMALL)
        assert "--target perplexity=+1% is for sparsify" in told

    @pytest.mark.parametrize("more", [(), ("--dry-run",)])
    def test_weights_that_are_not_in_memory(self, fails: Fails, checkpoint: Path, tmp_path: Path, more: Any) -> None:
        told = fails(2, "answer", checkpoint, "--out", tmp_path / "out", "--stream", "cpu", *SMALL, *more)
        assert "measures on weights in memory" in told

    def test_dry_run(self, ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
        told = ok("answer", checkpoint, "--out", tmp_path / "out", "--dry-run", *SMALL).stdout
        assert told.count("removed at the end") == 3 and "nothing was computed" in told
        assert "unknown" not in told and "it fits" in told
        assert not (tmp_path / "out").exists()
