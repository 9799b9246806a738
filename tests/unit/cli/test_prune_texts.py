"""prune on a mixture of texts: the default of a reconstruction, the user's own, the record, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import ffnscope
from ffnscope.apply.record import read_record
from ffnscope.io import read_plan
from ffnscope.run.texts import SHIPPED_TEXTS

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 16, "--max-length", 32, "--batch-size", 4, "--device", "cpu", "--no-evaluate")
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer t")


@pytest.fixture
def prune(checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("prune", checkpoint, "--out", tmp_path / "out", "--sparsity", 0.5, *SMALL)


def names(folder: Path) -> list[str]:
    text = read_record(folder).text
    assert text is not None
    return [one.name for one in text.source.parts]


def test_a_reconstruction_reads_all_shipped_texts(ok: Ok, prune: tuple[Any, ...], tmp_path: Path) -> None:
    ok(*prune, "--method", "best")
    assert sorted(names(tmp_path / "out")) == sorted(SHIPPED_TEXTS)


@pytest.mark.parametrize("own", [("--text", "pydoc_topics"), ("--split", "validation")])
def test_but_not_beside_a_text_of_the_user(
    ok: Ok, prune: tuple[Any, ...], own: tuple[str, str], tmp_path: Path
) -> None:
    ok(*prune, "--method", "best", *own)
    assert len(names(tmp_path / "out")) == 1


def test_a_ranking_alone_reads_one(ok: Ok, prune: tuple[Any, ...], tmp_path: Path) -> None:
    ok(*prune, "--metric", "wanda")
    assert names(tmp_path / "out") == ["sotu"]


def test_the_users_mixture_and_another_cut(ok: Ok, prune: tuple[Any, ...], texts: Path, tmp_path: Path) -> None:
    ok(*prune, "--method", "best", "--text", texts / "train.txt", "--mix", "pydoc_topics")
    assert names(tmp_path / "out") == [str(texts / "train.txt"), "pydoc_topics"]
    ok("prune", "--from", tmp_path / "out", "--out", tmp_path / "other", "--sparsity", 0.3, "--no-evaluate")
    plan = read_plan(tmp_path / "other" / "ffnscope_plan.json")
    assert plan.sparsity == pytest.approx(0.3, abs=0.02)
    assert names(tmp_path / "other") == names(tmp_path / "out")


def test_it_is_the_mixture_of_the_library(ok: Ok, prune: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    ok(*prune, "--metric", "wanda", "--mix", "pydoc_topics")
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    source = ffnscope.TextSource("sotu", mix=(ffnscope.TextSource("pydoc_topics"),))
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=16, length=32, seed=42)
    text = read_record(tmp_path / "out").text
    assert text is not None and text.hash == windows.hash


def test_held_out_of_every_text_must_be_known(fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    mix = ("--mix", texts / "train.txt")
    told = fails(2, "prune", checkpoint, "--out", tmp_path / "out", "--sparsity", 0.5, "--metric", "wanda", *mix)
    assert "train.txt has no known held-out split to measure on" in told


def test_the_same_text_twice(fails: Fails, prune: tuple[Any, ...]) -> None:
    assert "is in the mixture twice" in fails(2, *prune, "--metric", "wanda", "--mix", "sotu")
