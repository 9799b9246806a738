"""Checkpoints whose FFNs have different widths: what is in them, who loads them, and that nobody loads them wrongly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

import ffnscope
from checkpoints import CHAT_TEMPLATE, small_tokenizer
from ffnscope.apply.export import prune_, save_model
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import PruningPlan
from tiny import logits, tiny, tokens

MakePlan = Callable[..., PruningPlan]
FILE = "modeling_ffnscope.py"


@pytest.fixture
def uneven(llama: Any, random_plan: MakePlan) -> Any:
    """A tiny Llama of two FFNs of different widths."""
    return prune_(llama, random_plan(llama, 0.51, allocator="global"))


def trusted(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()


def files(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


class TestWhatIsInIt:
    def test_files_and_config(self, uneven: Any, tmp_path: Path) -> None:
        save_model(uneven, small_tokenizer(), tmp_path / "out")
        assert files(tmp_path / "out") == {
            *("config.json", "generation_config.json", "model.safetensors", FILE, "README.md"),
            *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        }
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
        assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_ffnscope.LlamaForCausalLM"}
        assert config["ffnscope_ffn_widths"] == {s.name: s.d_ff for s in find_sites(uneven)}
        assert config["intermediate_size"] == 48
        assert "per_layer_config" not in config

    def test_generation_config_tokenizer_and_chat_template(self, uneven: Any, tmp_path: Path) -> None:
        uneven.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[2, 5], bos_token_id=1)
        save_model(uneven, small_tokenizer(), tmp_path / "out")
        again = trusted(tmp_path / "out").generation_config
        assert (again.max_new_tokens, again.eos_token_id) == (7, [2, 5])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert tokenizer("We the people").input_ids == small_tokenizer()("We the people").input_ids

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shards_and_tied_weights(self, random_plan: MakePlan, tmp_path: Path, dtype: torch.dtype) -> None:
        model = tiny("llama", tie_word_embeddings=True, dtype=dtype)
        prune_(model, random_plan(model, 0.51, allocator="global"))
        save_model(model, None, tmp_path / "out", max_shard_size="10KB")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 2
        assert "lm_head.weight" not in index
        again = trusted(tmp_path / "out")
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert again.dtype == dtype and torch.equal(logits(again), logits(model))


class TestWhoLoadsIt:
    def test_ffnscope_without_running_foreign_code(self, uneven: Any, tmp_path: Path) -> None:
        save_model(uneven, small_tokenizer(), tmp_path / "out")
        (tmp_path / "out" / FILE).write_text("raise SystemExit('code beside the weights was run')\n")
        loaded = ffnscope.load_model(ffnscope.ModelSource(str(tmp_path / "out"), device="cpu"))
        assert torch.equal(logits(loaded.model), logits(uneven))
        assert isinstance(loaded.model, LlamaForCausalLM) and type(loaded.model).__name__ == "LlamaForCausalLM"

    @pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.float64}])
    def test_transformers_with_options(self, uneven: Any, tmp_path: Path, options: dict[str, Any]) -> None:
        save_model(uneven, None, tmp_path / "out")
        again = trusted(tmp_path / "out", **options)
        assert again.dtype == options.get("dtype", torch.float32)
        torch.testing.assert_close(logits(again).float(), logits(uneven), atol=1e-5, rtol=1e-5)

    def test_transformers_alone(self, uneven: Any, tmp_path: Path) -> None:
        """A process in which ffnscope cannot be imported."""
        save_model(uneven, None, tmp_path / "out")
        torch.save(logits(uneven), tmp_path / "expected.pt")
        torch.save(tokens(), tmp_path / "ids.pt")
        code = f"""
import sys; sys.modules["ffnscope"] = None
import torch; torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    found = model(input_ids=torch.load({str(tmp_path / "ids.pt")!r}), use_cache=False).logits
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r}))
"""
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)

    def test_it_behaves_like_the_stock_class(self, uneven: Any, tmp_path: Path) -> None:
        save_model(uneven, None, tmp_path / "out")
        again = trusted(tmp_path / "out")
        assert torch.equal(logits(copy.deepcopy(again)), logits(uneven))
        out = again.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert out.shape == (1, 7)
        again(input_ids=tokens(), labels=tokens()).loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in again.parameters())
        config = AutoConfig.from_pretrained(tmp_path / "out")
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert [s.d_ff for s in find_sites(fresh)] == [s.d_ff for s in find_sites(uneven)]

    def test_experts_of_different_layers(self, tmp_path: Path) -> None:
        """Expert tensors are stored per expert and fused on loading; the conversions of the family still apply."""
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model("mixtral", vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        experts = model.model.layers[1].mlp.experts
        rows = torch.cat([torch.arange(20), 48 + torch.arange(20)])
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[:, rows].clone())
        experts.down_proj = nn.Parameter(experts.down_proj.detach()[..., :20].clone())
        experts.intermediate_dim = 20
        folder = write_without_sites(model, tmp_path / "out")
        again = trusted(folder)
        assert again.model.layers[1].mlp.experts.down_proj.shape == (4, 32, 20)
        assert torch.equal(logits(again), logits(model))
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)


def write_without_sites(model: Any, path: Path) -> Path:
    """Save as `save_model` does, without asking where the FFNs are."""
    from ffnscope.apply import export

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "find_sites", lambda model: [])
        save_model(model, None, path)
    return path


class TestNobodyLoadsItWrongly:
    @pytest.mark.parametrize("trust", [None, False])
    @pytest.mark.parametrize(
        "maker", [AutoModelForCausalLM, LlamaForCausalLM, AutoModel, AutoModelForSequenceClassification]
    )
    def test_without_the_modeling_file(self, uneven: Any, tmp_path: Path, maker: Any, trust: bool | None) -> None:
        save_model(uneven, None, tmp_path / "out")
        with pytest.raises(RuntimeError, match="mismatch"):
            maker.from_pretrained(tmp_path / "out", trust_remote_code=trust)

    def test_as_another_auto_class(self, uneven: Any, tmp_path: Path) -> None:
        save_model(uneven, None, tmp_path / "out")
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)

    def test_a_lost_key(self, uneven: Any, tmp_path: Path) -> None:
        save_model(uneven, None, tmp_path / "out")
        file = tmp_path / "out" / "config.json"
        config = json.loads(file.read_text())
        del config["ffnscope_narrowed"]["model.layers.1.mlp.up_proj.weight"]
        file.write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="mismatch"):
            trusted(tmp_path / "out")
        del config["ffnscope_narrowed"]
        file.write_text(json.dumps(config))
        with pytest.raises(AttributeError, match="ffnscope_narrowed"):
            trusted(tmp_path / "out")


class TestPrunedAgain:
    def test_to_other_widths(self, uneven: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        save_model(uneven, None, tmp_path / "out")
        again = trusted(tmp_path / "out")
        before = [s.d_ff for s in find_sites(again)]
        prune_(again, random_plan(again, 0.5))
        save_model(again, None, tmp_path / "smaller")
        smaller = trusted(tmp_path / "smaller")
        assert torch.equal(logits(smaller), logits(again))
        assert [s.d_ff for s in find_sites(smaller)] == [-(-width // 2) for width in before]

    def test_to_one_width_leaves_nothing_behind(self, uneven: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        save_model(uneven, None, tmp_path / "out")
        again = trusted(tmp_path / "out")
        plan = random_plan(again, 0.5)
        kept = {site: torch.arange(8) for site in plan.kept}
        prune_(again, PruningPlan(kept, plan.metric, plan.allocator, plan.budget))
        save_model(again, None, tmp_path / "even")
        assert FILE not in files(tmp_path / "even")
        config = json.loads((tmp_path / "even" / "config.json").read_text())
        assert config["intermediate_size"] == 8
        assert not any(key.startswith("ffnscope") or key == "auto_map" for key in config)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "even")), logits(again))


def test_code_that_is_not_of_transformers(random_plan: MakePlan, tmp_path: Path) -> None:
    class Mine(LlamaForCausalLM):
        pass

    model = tiny("llama")
    model.__class__ = Mine
    prune_(model, random_plan(model, 0.51, allocator="global"))
    with pytest.raises(NotAvailableError, match=r"Mine comes with code of its own.*Pad to the widest"):
        save_model(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
