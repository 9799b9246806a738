"""Parameters, bytes and FLOPs by formula, against counting by hand and by torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.evaluate.costs import Work, count_costs, ffn_parameters, file_bytes, last_logits
from ffnscope.evaluate.expert_costs import expert_costs
from ffnscope.evaluate.throughput import generate
from ffnscope.ffn.sites import find_sites
from tiny import ARCHITECTURES, D_FF, HEADS, HIDDEN, LAYERS, VOCAB, tiny, tokens
from tiny_listed import tiny_listed
from tiny_moe import EXPERT, N_EXPERTS, TOP_K, tiny_moe

BATCH, PROMPT, NEW = 2, 11, 3
WORK = Work(BATCH, PROMPT, NEW)
WIDTH = HIDDEN // HEADS


def counted(model: Any, new_tokens: int) -> int:
    """FLOPs that torch counts in a generation; eager attention computes every query-key pair."""
    with FlopCounterMode(display=False) as counter:
        generate(model, tokens(BATCH, PROMPT), new_tokens)
    return counter.get_total_flops()


def pair_flops(model: Any, sites: list[Any]) -> int:
    """FLOPs of one query-key pair, by the difference of two prompts' decode costs."""
    one, other = (count_costs(model, sites, Work(1, n, 1)).decode_flops for n in (4, 5))
    return other - one


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name != "bert"])  # its LM head is two matrices
def test_flops_are_those_that_torch_counts(arch: str) -> None:
    model = tiny(arch, attn_implementation="eager")
    sites = find_sites(model)
    costs = count_costs(model, sites, WORK)
    masked = PROMPT * (PROMPT - 1) // 2  # pairs that a causal mask leaves out, and eager attention computes
    prefill = costs.prefill_flops + BATCH * masked * pair_flops(model, sites)
    assert pair_flops(model, sites) == LAYERS * 2 * 2 * model.config.hidden_size  # all heads' keys and values
    assert counted(model, NEW) == prefill + costs.decode_flops
    one_step = count_costs(model, sites, Work(BATCH, PROMPT, 1)).decode_flops
    assert counted(model, 1) == prefill + one_step


def test_flops_follow_the_pruned_widths(random_plan: Any) -> None:
    model = tiny("phi3", attn_implementation="eager")
    dense = count_costs(model, find_sites(model), WORK)
    ffnscope.slice_(model, random_plan(model, 0.5))
    pruned = count_costs(model, find_sites(model), WORK)
    gone = LAYERS * 3 * HIDDEN * D_FF // 2
    assert dense.parameters - pruned.parameters == dense.ffn_parameters - pruned.ffn_parameters == gone
    assert dense.prefill_flops - pruned.prefill_flops == 2 * BATCH * PROMPT * gone
    assert dense.decode_flops - pruned.decode_flops == 2 * BATCH * NEW * gone
    assert dense.read_bytes - pruned.read_bytes == dense.parameter_bytes - pruned.parameter_bytes == 4 * gone


def test_llama_by_hand() -> None:
    attention = HIDDEN * HIDDEN * 2 + HIDDEN * HIDDEN // 2 * 2  # two of four heads for keys and values
    ffn = 3 * HIDDEN * D_FF
    norms = LAYERS * 2 * HIDDEN + HIDDEN
    table = VOCAB * HIDDEN
    for tied in (False, True):
        model = tiny("llama", tie_word_embeddings=tied)
        costs = count_costs(model, find_sites(model), Work(1, 5, 1))
        body = LAYERS * (attention + ffn)
        assert costs.parameters == body + norms + (1 if tied else 2) * table
        assert costs.ffn_parameters == LAYERS * ffn
        assert costs.parameter_bytes == 4 * costs.parameters
        assert costs.read_bytes == 4 * (body + norms + table)  # the LM head, not the embedding
        pair = LAYERS * HEADS * 4 * WIDTH
        assert costs.prefill_flops == 2 * (5 * body + table) + 15 * pair
        assert costs.decode_flops == 2 * (body + table) + 6 * pair


def test_biases_count_as_ffn_parameters() -> None:
    for arch, ffn in (
        ("gpt2", 2 * HIDDEN * D_FF + D_FF + HIDDEN),
        ("llama_bias", 3 * HIDDEN * D_FF + 2 * D_FF + HIDDEN),
        ("phi3", 3 * HIDDEN * D_FF),
    ):
        model = tiny(arch)
        assert [ffn_parameters(model, site) for site in find_sites(model)] == [ffn] * LAYERS


def test_position_tables_are_not_read() -> None:
    model = tiny("gpt2")
    costs = count_costs(model, find_sites(model), WORK)
    assert costs.parameter_bytes - costs.read_bytes == model.transformer.wpe.weight.nbytes  # wte is the LM head


def test_half_the_bytes_in_bfloat16() -> None:
    wide, narrow = (tiny("llama", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    costs = [count_costs(model, find_sites(model), WORK) for model in (wide, narrow)]
    assert costs[0].read_bytes == 2 * costs[1].read_bytes
    assert costs[0].prefill_flops == costs[1].prefill_flops


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    count_costs(model, find_sites(model), WORK)
    assert all(module.training for module in model.modules())


def test_all_logits_where_a_model_gives_no_choice() -> None:
    model = tiny("llama")
    assert last_logits(model) == {"logits_to_keep": 1}

    class Plain(type(model)):
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    last = count_costs(model, find_sites(model), WORK).prefill_flops
    model.__class__ = Plain
    assert last_logits(model) == {}
    every = count_costs(model, find_sites(model), WORK).prefill_flops
    assert every - last == 2 * BATCH * (PROMPT - 1) * VOCAB * HIDDEN


def test_work_must_be_positive() -> None:
    for name in ("batch_size", "prompt_length", "new_tokens"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1; got 0"):
            Work(**{name: 0})


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_flops_of_mixtures_are_those_that_torch_counts(name: str) -> None:
    model = tiny_moe(name, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    sites = find_sites(model)
    costs = count_costs(model, sites, Work(1, PROMPT, NEW))
    pairs = PROMPT * (PROMPT - 1) // 2
    expected = costs.prefill_flops + pairs * pair_flops(model, sites) + costs.decode_flops
    with FlopCounterMode(display=False) as counter:
        generate(model, tokens(1, PROMPT), NEW)
    # all tokens are multiplied with all experts here, most of them with zeros
    batched = 0 if name != "llama4_text" else (N_EXPERTS - TOP_K) * (PROMPT + NEW) * LAYERS * 6 * HIDDEN * EXPERT
    assert counter.get_total_flops() == expected + batched


def test_bytes_of_experts_that_a_step_reads() -> None:
    model = tiny_moe("mixtral")
    sites = find_sites(model)
    expert = 4 * 3 * HIDDEN * EXPERT
    one, two = (count_costs(model, sites, Work(b, 4, 1)) for b in (1, 2))
    assert one.experts is not None and two.experts is not None
    assert (one.experts.total, one.experts.per_token, one.experts.per_step) == (N_EXPERTS, TOP_K, TOP_K)
    assert two.experts.per_step == N_EXPERTS * (1 - (1 - TOP_K / N_EXPERTS) ** 2) == 3
    dense = one.parameter_bytes - model.get_input_embeddings().weight.nbytes
    assert one.read_bytes == dense - 2 * (N_EXPERTS - 2) * expert
    assert two.read_bytes == dense - 2 * (N_EXPERTS - 3) * expert


def test_experts_that_are_modules_cost_the_same() -> None:
    listed = tiny_listed()
    sites = find_sites(listed)
    found = expert_costs(listed, sites, 1)
    assert found is not None
    each = 3 * HIDDEN * EXPERT
    assert (found.entries, found.active_entries) == (2 * N_EXPERTS * each, 2 * TOP_K * each)
    assert found.idle_bytes == 4 * 2 * (N_EXPERTS - TOP_K) * each


def test_experts_of_attention_are_refused() -> None:
    model = tiny_moe("jetmoe")
    with pytest.raises(NotAvailableError, match=r"self_attention.experts.* is named like experts, but is none of the"):
        count_costs(model, find_sites(model), WORK)


def test_a_model_without_a_number_of_heads_is_refused() -> None:
    model = tiny("llama")
    sites = find_sites(model)
    vars(model.config)["num_attention_heads"] = [4, 4]
    with pytest.raises(NotAvailableError, match=r"gives num_attention_heads as \[4, 4\]"):
        count_costs(model, sites, WORK)


def test_file_bytes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    loaded = ffnscope.load_model(str(folder))
    (folder / "other.safetensors").write_bytes(b"0" * 99)
    assert file_bytes(loaded) == (folder / "model.safetensors").stat().st_size
    whole = file_bytes(loaded)
    loaded.model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    loaded.tokenizer.save_pretrained(tmp_path / "shards")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    found = file_bytes(ffnscope.load_model(str(tmp_path / "shards")))
    assert found == sum(shard.stat().st_size for shard in shards)
    assert whole is not None and abs(found - whole) < 5000  # headers


def test_file_bytes_of_the_hub_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / "abc"
    (cache / "models--some--model" / "refs").mkdir(parents=True)
    (cache / "models--some--model" / "refs" / "main").write_text("abc")
    loaded = ffnscope.load_model(str(make_checkpoint(snapshot)))
    source = replace(loaded.source, cache_dir=str(cache))
    hub = replace(loaded, origin="some/model", source=source)
    assert file_bytes(hub) == (snapshot / "model.safetensors").stat().st_size
    assert file_bytes(replace(hub, origin="some/other")) is None
