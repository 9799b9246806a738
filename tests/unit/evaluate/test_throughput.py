"""Timed generation and rounds: what is generated, counted and refused. No timing is judged."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from ffnscope.errors import NonFiniteError, NotAvailableError, UsageError
from ffnscope.evaluate import throughput
from ffnscope.evaluate.costs import Work
from ffnscope.evaluate.throughput import Spread, generate, random_prompt, take_turns, threads
from tiny import LAYERS, VOCAB, logits, tiny, tokens

BATCH, PROMPT, NEW = 2, 6, 4
WORK = Work(BATCH, PROMPT, NEW)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "READ_BYTES", (2**12, 2**13))
    monkeypatch.setattr(throughput, "MATRIX", {"cpu": 16})


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
def test_generation_is_greedy(arch: str) -> None:
    model = tiny(arch)
    prompt = tokens(BATCH, PROMPT)
    expected = prompt
    for _ in range(NEW + 1):  # without a cache
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    found = generate(model, prompt, NEW)
    assert torch.equal(found.tokens, expected[:, PROMPT:])
    assert found.prefill > 0 and found.decode > 0


def test_cache_bytes() -> None:
    found = generate(tiny("llama"), tokens(BATCH, PROMPT), NEW)
    per_token = LAYERS * 2 * 2 * 8 * 4  # keys and values of two heads of width 8 in float32
    assert found.cache_bytes == (BATCH * PROMPT * per_token, BATCH * (PROMPT + NEW) * per_token)


def test_rounds() -> None:
    models = {"a": tiny("llama").train(), "b": tiny("llama", seed=1)}
    calls: list[str] = []
    for label, model in models.items():
        model.register_forward_pre_hook(lambda *_, label=label: calls.append(label))
    seen: list[tuple[int, int]] = []
    found = take_turns(models, WORK, repeats=3, warmup=1, seed=0, on_round=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert calls[:: 1 + NEW] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    for spread in (*found.prefill.values(), *found.decode.values(), found.bandwidth, found.matmul):
        assert len(spread.samples) == 3
        assert all(sample > 0 for sample in spread.samples)
    assert found.cache_bytes["a"] == found.cache_bytes["b"]
    assert models["a"].training and not models["b"].training


def test_prompts_depend_on_the_seed_only() -> None:
    model = tiny("llama")
    prompt = random_prompt(model, WORK, 3)
    assert prompt.shape == (BATCH, PROMPT) and int(prompt.max()) < VOCAB
    assert torch.equal(prompt, random_prompt(tiny("gpt2"), WORK, 3))
    assert not torch.equal(prompt, random_prompt(model, WORK, 4))


def test_spread() -> None:
    spread = Spread((4.0, 1.0, 2.0, 8.0, 3.0))
    assert spread.median == 3
    assert spread.quartiles == (2, 4)
    assert spread.to_dict() == {"median": 3, "q1": 2, "q3": 4, "samples": [4, 1, 2, 8, 3]}
    assert spread.over(Spread((2.0, 1.0, 1.0, 1.0, 1.0))).samples == (2, 1, 2, 8, 3)
    assert spread.per_second(8).median == statistics.median([2, 8, 4, 1, 8 / 3])
    with pytest.raises(UsageError, match="at least 2 samples; got 1"):
        Spread((1.0,))


def test_too_many_tokens_for_the_positions() -> None:
    message = r"prompt_length 60 \+ new_tokens 5 = 65 tokens do not fit into LlamaForCausalLM, which has 64"
    with pytest.raises(UsageError, match=message):
        take_turns({"a": tiny("llama")}, Work(1, 60, 5), repeats=2, warmup=0, seed=0)


def test_broken_logits_raise() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="logits of LlamaForCausalLM are NaN or infinite after 4 new tokens"):
        generate(model, tokens(BATCH, PROMPT), NEW)


def test_a_model_without_a_cache_is_refused() -> None:
    model: Any = tiny("llama")

    class Forgetful(type(model)):
        def forward(self, *args: Any, use_cache: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, use_cache=False, **kwargs)

    model.__class__ = Forgetful
    with pytest.raises(NotAvailableError, match="Forgetful returned no KV cache"):
        generate(model, tokens(BATCH, PROMPT), NEW)


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before
