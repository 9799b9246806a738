"""prune: which text the result is measured on, and what is refused before any work leaves a folder."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import ffnscope
from checkpoints import small_tokenizer
from ffnscope.apply.record import read_record, text_source
from ffnscope.calibrate.corpora import corpus
from ffnscope.calibrate.text import load_documents
from ffnscope.cli import prune_texts
from ffnscope.io import read_plan
from ffnscope.run import find_record
from tiny import tiny

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 16, "--max-length", 32, "--device", "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer t")


def rows(path: Path, count: int) -> Path:
    """A .jsonl file of some documents."""
    found = [text[:4000] for _, text in itertools.islice(corpus("stdlib_source", "train"), count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return rows(tmp_path / "mine.jsonl", 24)


@pytest.fixture
def base(checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    """A small pruning that is measured."""
    return ("prune", checkpoint, "--out", tmp_path / "out", "--sparsity", 0.5, "-m", "wanda", *SMALL)


def test_own_documents_are_held_out(ok: Ok, base: tuple[Any, ...], own: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The README's call: own text and something general."""
    result = ok(*base, "--sequential", "--text", own, "--mix", "sotu")
    assert "dense" in result.stdout and "Perplexity on" in result.stdout
    assert "every 8th document" in (tmp_path / "out" / "README.md").read_text()
    record = read_record(tmp_path / "out")
    assert record.text is not None
    fit, measured = record.text.source, text_source(**record.held_out["source"])
    assert [(one.part, one.split) for one in fit.parts] == [("fit", None), (None, "train")]
    assert [(one.part, one.split) for one in measured.parts] == [("held_out", None), (None, "test")]
    kept, held_out = (list(load_documents(one.parts[0])) for one in (fit, measured))
    assert (len(kept), len(held_out)) == (21, 3) and not set(kept) & set(held_out)
    assert held_out == list(load_documents(ffnscope.TextSource(str(own), split=None)))[7::8]
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    windows = ffnscope.load_windows(measured, loaded.tokenizer, n=16, length=32, seed=42)
    told = re.search(r"\| dense \| perplexity \| ([\d.]+)", (tmp_path / "out" / "README.md").read_text())
    assert told and f"{ffnscope.perplexity(loaded.model, windows).value:.6g}" == told[1]
    moved = tmp_path / "moved.jsonl"
    shutil.move(own, moved)
    again = ("prune", "--from", tmp_path / "out", "--sparsity", 0.3, "--out", tmp_path / "cut", "--device", "cpu")
    ok(*again, "--text", moved)
    assert told[0] in (tmp_path / "cut" / "README.md").read_text()


def test_each_text_is_cut_once(ok: Ok, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    cut, load_cut = list[tuple[str, str | None]](), prune_texts.load_cut

    def counted(source: ffnscope.TextSource, *rest: Any) -> Any:
        cut.append((source.name, source.split))
        return load_cut(source, *rest)

    monkeypatch.setattr(prune_texts, "load_cut", counted)
    ok(*base, "--text", "sotu", "--held-out-text", "pydoc_topics")
    assert sorted(cut) == [("pydoc_topics", "test"), ("sotu", "train")]


def test_a_text_to_measure_on(ok: Ok, base: tuple[Any, ...], own: Path, tmp_path: Path) -> None:
    result = ok(*base, "--text", own, "--held-out-text", "pydoc_topics")
    assert "Perplexity on pydoc_topics" in result.stdout
    record = read_record(tmp_path / "out")
    assert record.text is not None and record.text.source.part is None  # all of it calibrates
    assert record.held_out["source"]["split"] == "test"
    result = ok("prune", "--from", tmp_path / "out", "--sparsity", 0.3, "--out", tmp_path / "cut", "--device", "cpu")
    assert "Perplexity on pydoc_topics" in result.stdout


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_documents(fails: Fails, base: tuple[Any, ...], tmp_path: Path, count: int) -> None:
    few = rows(tmp_path / "few.jsonl", count)
    written = fails(2, *base, "--text", few)
    assert f"few.jsonl has {count} document(s), and every 8th is held out: at least 8 are needed." in written
    assert "--held-out-text" in written and "--no-evaluate" in written
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_what_cannot_be_measured(fails: Fails, base: tuple[Any, ...], own: Path, texts: Path, tmp_path: Path) -> None:
    written = fails(2, *base, "--text", texts / "train.txt")
    assert "(a .txt file is one document, of which none can be held out)" in written
    assert "Name a text to measure on (--held-out-text), or pass --no-evaluate." in written
    assert "none.jsonl does not exist" in fails(2, *base, "--text", tmp_path / "none.jsonl")
    plan = ("--plan", tmp_path / "p.json", "--text", own, "--out", tmp_path / "out")
    assert "has no known held-out split" in fails(2, "prune", base[1], *plan)


def test_the_calibration_is_not_measured_on(fails: Fails, base: tuple[Any, ...], own: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(own)
    for other in (own, tmp_path / "link.jsonl"):
        written = fails(2, *base, "--text", own, "--held-out-text", other)
        assert "the result would be measured on" in written and "on which it is calibrated" in written
    shipped = ("--held-out-text", "sotu", "--held-out-split", "train")
    assert "on which it is calibrated" in fails(2, *base, "--text", "sotu", *shipped)
    assert "--held-out-text would do nothing with --no-evaluate" in fails(
        2, *base, "--no-evaluate", "--held-out-text", own
    )
    assert "--held-out-split would do nothing with no --held-out-text" in fails(2, *base, "--held-out-split", "test")


def test_the_plain_flag(ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
    plans: list[Any] = []
    for name, flag in (("a", ["--sequential"]), ("b", ["--reconstruct", "sequential"])):
        ok(*base, "--no-evaluate", "--text", "pydoc_topics", "--out", tmp_path / name, *flag)
        plans.append(read_plan(tmp_path / name / "ffnscope_plan.json"))
    assert plans[0].provenance == plans[1].provenance
    assert plans[0].provenance["reconstruction"]["method"] == "sequential"
    written = fails(2, *base, "--sequential", "--reconstruct", "one-shot")
    assert "--sequential is the same as --reconstruct sequential; --reconstruct one-shot is another" in written


class TestBeforeAnyWork:
    """No folder is left where the call cannot succeed."""

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (("--method", "best", "--sparsity", 0.99), "a sparsity of 0.99 leaves 1"),
            (("--method", "best", "--distill", 2, "--num-samples", 7), "holds out every 8th window"),
        ],
    )
    def test_refused(
        self, fails: Fails, base: tuple[Any, ...], tmp_path: Path, options: tuple[Any, ...], text: str
    ) -> None:
        written = fails(2, *base, "--text", "pydoc_topics", *options)
        assert text in written and "calibrate:" not in written
        assert list(tmp_path.iterdir()) == []

    def test_a_tokenizer_with_more_ids_than_rows(self, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
        model = tiny("llama", vocab_size=64)
        model.save_pretrained(tmp_path / "model")
        small_tokenizer().save_pretrained(tmp_path / "model")
        written = fails(2, "prune", tmp_path / "model", *base[2:], "--text", "pydoc_topics")
        assert "the text has token ids up to" in written and "has 64 rows, for ids 0 to 63" in written
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_too_few_tokens_are_told_also_in_a_dry_run(self, ok: Ok, base: tuple[Any, ...]) -> None:
        few = ("--text", "pydoc_topics", "--num-samples", 2)
        result = ok(*base, *few, "--sequential", "--no-evaluate", "--dry-run")
        told = result.stdout + result.stderr
        assert "warning: 2 of 2 FFNs will be fitted on fewer tokens than 4 d_ff (model.layers.0.mlp: 64 tokens" in told
        assert "192 tokens of text would do" in told
        assert "fewer tokens" not in ok(*base, *few, "--no-evaluate", "--dry-run").stderr

    def test_the_warning_is_said_once(self, ok: Ok, base: tuple[Any, ...]) -> None:
        few = ("--text", "pydoc_topics", "--num-samples", 2)
        result = ok(*base, *few, "--sequential", "--no-evaluate")
        assert result.stderr.count("fewer tokens than 4 d_ff") == 1
        assert result.stderr.index("fewer tokens") < result.stderr.index("calibrate")


def test_a_run_tells_what_it_was_measured_on(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    from ffnscope.run import config_from_dict
    from runs import quiet_run, small_run

    found = quiet_run(config_from_dict(small_run(checkpoint, texts, tmp_path / "run")))
    record = find_record(found.folder, "random")
    assert text_source(**record.held_out["source"]).name == str(texts / "test.txt")


def test_fewer_tokens_than_rows_of_the_embedding_are_fine() -> None:
    from ffnscope.calibrate.forward import check_ids
    from ffnscope.calibrate.windows import contiguous_windows
    from ffnscope.errors import UsageError

    model = tiny("llama", vocab_size=64)
    check_ids(model, contiguous_windows(torch.tensor([[0, 63]]), "text"))
    with pytest.raises(UsageError, match=r"ids up to 64 \(1 tokens\).*LlamaForCausalLM has 64 rows, for ids 0 to 63"):
        check_ids(model, contiguous_windows(torch.tensor([[0, 64]]), "text"))
