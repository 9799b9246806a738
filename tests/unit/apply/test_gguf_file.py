from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

import ffnscope
from checkpoints import VOCABULARY, small_tokenizer
from ffnscope.apply.export import prune_
from ffnscope.apply.gguf_file import save_gguf
from ffnscope.apply.gguf_tokenizer import SPLITS, read_vocabulary
from ffnscope.errors import ArtifactError, NotAvailableError
from ffnscope.types import PruningPlan
from reference import text
from tiny import logits, tiny

MakePlan = Callable[..., PruningPlan]
WINDOWS = text(32)
TEXT = "Fellow-citizens of the Senate,\n\n 1234 états: <s> we’re here</s>  "


def small(**changes: Any) -> Any:
    return tiny("llama", **{"vocab_size": VOCABULARY, **changes})


def read_back(path: Path, **options: Any) -> Any:
    place = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(path.parent, **place, **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_read_back(dtype: torch.dtype, tied: bool, random_plan: MakePlan, tmp_path: Path) -> None:
    model = small(dtype=dtype, tie_word_embeddings=tied)
    prune_(model, random_plan(model))
    path = tmp_path / "new" / "out.gguf"
    save_gguf(model, small_tokenizer(), path)
    assert list(path.parent.iterdir()) == [path]
    again = read_back(path, dtype=dtype)
    assert torch.equal(logits(again), logits(model))
    assert again.config.intermediate_size == 36
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in names) != tied


def test_mistral_and_a_wide_head(random_plan: MakePlan, tmp_path: Path) -> None:
    for arch, more in (("mistral", {"sliding_window": None}), ("llama", {"head_dim": 16})):
        model = tiny(arch, vocab_size=VOCABULARY, **more)
        prune_(model, random_plan(model))
        save_gguf(model, small_tokenizer(), tmp_path / f"{arch}.gguf")
        assert torch.equal(logits(read_back(tmp_path / f"{arch}.gguf")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_compensation(
    dtype: torch.dtype, random_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFNSCOPE_CACHE", str(tmp_path / "cache"))
    model = small(dtype=dtype)
    plan, stats = random_plan(model, 0.5), ffnscope.collect(model, WINDOWS, ["act_sum"])
    made = ffnscope.compensate_bias(model, plan, stats)
    ffnscope.reconstruct_(model, made)
    with pytest.warns(UserWarning, match="holds biases of FFNs.*plain transformers drops them"):
        save_gguf(model, small_tokenizer(), tmp_path / "out.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for i, (site, bias) in enumerate(made.bias.items()):
        assert torch.equal(torch.tensor(tensors[f"blk.{i}.ffn_down.bias"]), bias.float()), site.name
        assert not tensors[f"blk.{i}.ffn_gate.bias"].any() and not tensors[f"blk.{i}.ffn_up.bias"].any()
    name = str(dtype).removeprefix("torch.")
    again = ffnscope.load_model(ffnscope.ModelSource(str(tmp_path / "out.gguf"), device="cpu", dtype=name)).model
    assert again.config.mlp_bias is True
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(read_back(tmp_path / "out.gguf", dtype=dtype)), logits(model))  # as is warned


def test_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    save_gguf(small(), tokenizer, tmp_path / "out.gguf")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.decode(again(TEXT).input_ids) == TEXT
    assert again.chat_template == tokenizer.chat_template
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_ffnscope_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFNSCOPE_CACHE", str(tmp_path / "cache"))
    model = small()
    save_gguf(model, small_tokenizer(), tmp_path / "out.gguf")
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(tmp_path / "out.gguf"), device="cpu"))
    assert torch.equal(logits(loaded.model), logits(model))


def test_a_model_loaded_from_it_saves_as_plain_safetensors(
    random_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFNSCOPE_CACHE", str(tmp_path / "cache"))
    save_gguf(small(), small_tokenizer(), tmp_path / "out.gguf")
    by_ffnscope = ffnscope.load_model(ffnscope.ModelSource(str(tmp_path / "out.gguf"), device="cpu")).model
    for name, model in (("one", by_ffnscope), ("two", read_back(tmp_path / "out.gguf"))):
        plan = random_plan(model, 0.51, allocator="global" if name == "two" else "local")
        ffnscope.save_model(prune_(model, plan), None, tmp_path / name)
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
        assert (tmp_path / name / "model.safetensors").exists()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=name == "two").eval()
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        *(
            (
                [
                    pre_tokenizers.Split(Regex(pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ],
                rule,
            )
            for pattern, rule in SPLITS.items()
        ),
    ],
)
def test_splitting_rules(parts: list[Any], rule: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    assert read_vocabulary(tokenizer, VOCABULARY).rule == rule
    save_gguf(small(), tokenizer, tmp_path / "out.gguf")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    if rule != "smollm":  # read back by transformers as gpt-2, which does not part digits
        assert again(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_a_vocabulary_smaller_than_the_embedding(tmp_path: Path) -> None:
    model = small(vocab_size=VOCABULARY + 4)
    save_gguf(model, small_tokenizer(), tmp_path / "out.gguf")
    assert torch.equal(logits(read_back(tmp_path / "out.gguf")), logits(model))
    found = read_vocabulary(small_tokenizer(), VOCABULARY + 4)
    assert found.tokens[-1] == f"[PAD{VOCABULARY + 3}]" and found.kinds[-1] == gguf.TokenType.UNUSED
    assert found.kinds[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("gpt2", {}, "'gguf' is for LlamaForCausalLM and MistralForCausalLM.*this model is a GPT2LMHeadModel"),
        (
            "llama",
            {"attention_bias": True},
            "'gguf' has no place for model.layers.0.self_attn.q_proj.bias in a Llama. Save in",
        ),
        ("llama", {"hidden_act": "relu"}, "'gguf' has no place for activation relu in a Llama"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "not available for rotary embeddings of type 'linear'",
        ),
    ],
)
def test_refused_models(arch: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match=message):
        save_gguf(tiny(arch, vocab_size=VOCABULARY, **changes), small_tokenizer(), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_refused_widths(random_plan: MakePlan, tmp_path: Path) -> None:
    model = small()
    prune_(model, random_plan(model, 0.51, allocator="global"))
    with pytest.raises(NotAvailableError, match=r"one width for all FFNs; these have 2\d to 2\d channels. Pad to the"):
        save_gguf(model, small_tokenizer(), tmp_path / "out.gguf")


def test_refused_tokenizers(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 5}, unk_token="a")))
    other = small_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tokenizer in (None, words, other):
        with pytest.raises(NotAvailableError, match="available for byte-level BPE tokenizers that split like GPT-2"):
            save_gguf(small(), tokenizer, tmp_path / "out.gguf")


def test_what_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_text("old")
    with pytest.raises(ArtifactError, match="already exists"):
        save_gguf(small(), small_tokenizer(), path)
    assert path.read_text() == "old"
    save_gguf(small(), small_tokenizer(), path, overwrite=True)
    assert read_back(path).config.intermediate_size == 48
