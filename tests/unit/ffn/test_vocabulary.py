"""Embedding and LM head that are read in rows give the same statistics, losses and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import small_tokenizer
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.evaluate.compare import compare_plans
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn import vocabulary
from ffnscope.ffn.load import ModelSource, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.vocabulary import sliced_head
from ffnscope.plan.build import build_plan
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import Budget
from reference import calibrate_in_two, exact, padded, some_core, text
from streams import distance, streamed
from tiny import tiny

VOCAB = 1500
WINDOWS = padded([16, 9, 16, 12, 5])
CHANNELS = [name for name in METRICS.names() if METRICS.get(name).scope == "site"]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "SLICE", 1000)


def watched(model: Any) -> list[str]:
    """Where the weights of embedding and head are whenever they run."""
    found: list[str] = []
    for one in (model.get_input_embeddings(), model.get_output_embeddings()):
        one.register_forward_hook(lambda module, args, out: found.append(module.weight.device.type))
    return found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_every_statistic_in_float64(changes: dict[str, Any]) -> None:
    model = exact("llama", vocab_size=VOCAB, **changes)
    core = some_core(find_sites(model))
    twin = streamed(model)
    wanted = calibrate_in_two(model, WINDOWS, core, batch_size=2)
    places = watched(twin)
    assert distance(calibrate_in_two(twin, WINDOWS, core, batch_size=2), wanted) <= 1e-9
    assert set(places) == {"meta"}


def test_losses_and_comparisons_in_float64() -> None:
    model = exact("llama", vocab_size=VOCAB)
    twin = streamed(model)
    scores = score(model, calibrate(model, WINDOWS, ["wanda"]), "wanda")
    plans = {"half": build_plan(scores, Budget(0.5), "local")}
    places = watched(twin)
    assert perplexity(twin, WINDOWS).value == pytest.approx(perplexity(model, WINDOWS).value, rel=1e-12)
    found, wanted = (compare_plans(one, plans, WINDOWS, batch_size=2) for one in (twin, model))
    assert [r.value for row in found for r in row.results] == pytest.approx(
        [r.value for row in wanted for r in row.results], rel=1e-9
    )
    assert set(places) == {"meta"}


@pytest.mark.parametrize("arch", ["gemma2", "gpt2", "phi", "opt_projected", "bert"])
def test_scaled_heads_and_biases(arch: str) -> None:
    model = tiny(arch, vocab_size=VOCAB)
    wanted = calibrate(model, text(5), CHANNELS, options=PassOptions(batch_size=2))
    found = calibrate(streamed(model), text(5), CHANNELS, options=PassOptions(batch_size=2))
    assert distance(found, wanted) <= 1e-5


def test_slices_of_a_file(tmp_path: Path) -> None:
    tiny("llama", vocab_size=VOCAB).save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    dense = load_model(ModelSource(str(tmp_path / "model"), device="cpu", dtype="float32")).model
    twin = load_model(ModelSource(str(tmp_path / "model"), device="cpu", dtype="float32", stream="cpu")).model
    places = watched(twin)
    options = PassOptions(batch_size=2)
    wanted = calibrate(dense, WINDOWS, ["scar_loss_proxy"], options=options)
    assert distance(calibrate(twin, WINDOWS, ["scar_loss_proxy"], options=options), wanted) <= 1e-5
    assert set(places) == {"meta"}


def test_a_head_that_is_no_larger_than_a_block_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = streamed(tiny("llama", vocab_size=VOCAB))
    with sliced_head(twin, [twin.model.layers[0]]) as spared:
        assert spared == [twin.lm_head]
    monkeypatch.setattr(vocabulary, "SLICE", VOCAB * twin.config.hidden_size)
    with sliced_head(twin, [twin.model.layers[0]]) as spared:
        assert spared == []


def test_the_model_is_left_as_it_was() -> None:
    twin = streamed(exact("llama", vocab_size=VOCAB))
    before = [vars(m).get("forward") for m in twin.modules()]
    calibrate(twin, WINDOWS, ["scar_loss_proxy"])
    assert [vars(m).get("forward") for m in twin.modules()] == before
    assert all(p.device.type == "meta" for p in twin.parameters())
