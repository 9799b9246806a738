from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.types import Budget, FFNSite, PruningPlan

VOCAB = 64
D_FF = 48


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=D_FF,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows() -> Windows:
    ids = torch.randint(VOCAB, (7, 12), generator=torch.Generator().manual_seed(1))
    return contiguous_windows(ids, "random tokens")


@pytest.fixture
def padded() -> Windows:
    """Five right-padded rows of 3 to 12 tokens; in row 2 only some tokens are targets."""
    ids = torch.randint(VOCAB, (5, 12), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([12, 3, 9, 5, 7])
    valid = torch.arange(12)[None] < lengths[:, None]
    targets = valid.clone()
    targets[:, 0] = False
    targets[2, 1:5] = False
    return Windows(ids, valid, targets, torch.arange(5), "padded rows")


@pytest.fixture
def make_plan() -> Callable[..., PruningPlan]:
    """Keep a random share of the channels of both layers."""

    def make(sparsity: float, metric: str = "random", seed: int = 0) -> PruningPlan:
        random = torch.Generator().manual_seed(seed)
        width = D_FF - round(sparsity * D_FF)
        kept = {
            FFNSite(i, f"model.layers.{i}.mlp", "gate_proj", "up_proj", "down_proj", 32, D_FF, "silu"): torch.randperm(
                D_FF, generator=random
            )[:width]
            .sort()
            .values
            for i in range(2)
        }
        return PruningPlan(kept, metric, "local", Budget(sparsity), provenance={"seed": seed})

    return make
