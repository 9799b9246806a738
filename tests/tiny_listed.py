"""A tiny causal LM whose experts are modules in a list, as in code that comes with older checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tiny import HIDDEN, VOCAB, redraw
from tiny_moe import EXPERT, N_EXPERTS, TOP_K


class ListedConfig(PreTrainedConfig):
    """``dispatch`` is how tokens get to their experts."""

    model_type = "listed_experts"
    vocab_size: int = VOCAB
    hidden_size: int = HIDDEN
    intermediate_size: int = EXPERT
    num_hidden_layers: int = 2
    num_local_experts: int = N_EXPERTS
    num_experts_per_tok: int = TOP_K
    dispatch: str = "index"
    hidden_act: str = "silu"


class Expert(nn.Module):
    def __init__(self, config: ListedConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: ListedConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.dispatch = config.dispatch
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_local_experts)])

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.gate(hidden).softmax(-1).topk(self.top_k, dim=-1)
        return weights, index

    def forward(self, states: Tensor) -> Tensor:
        hidden = states.view(-1, states.shape[-1])
        weights, index = self.route(hidden)
        return getattr(self, f"_{self.dispatch}")(hidden, weights, index).view_as(states)

    def _index(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            tokens, place = (index == e).nonzero(as_tuple=True)
            out = out.index_add(0, tokens, expert(hidden[tokens]) * weights[tokens, place, None])
        return out

    def _leading(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            place, tokens = (index == e).T.nonzero(as_tuple=True)
            if tokens.numel():
                given = hidden[None, tokens].reshape(-1, hidden.shape[-1])
                out = out.index_add(0, tokens, expert(given) * weights[tokens, place, None])
        return out

    def _mask(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            chosen = (index == e).any(-1)
            weight = (weights * (index == e)).sum(-1)
            out[chosen] = out[chosen] + expert(hidden[chosen]) * weight[chosen, None]
        return out

    def _sorted(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        order = index.flatten().argsort(stable=True)
        given = hidden[order // self.top_k]
        counts = torch.bincount(index.flatten(), minlength=len(self.experts)).tolist()
        parts, start = [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                parts.append(expert(given[start : start + count]))
            start += count
        rows = torch.cat(parts) * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add(0, order // self.top_k, rows)

    def _named(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Every argument of the indexing by its name."""
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            tokens, place = (index == e).nonzero(as_tuple=True)
            given = torch.index_select(input=hidden, dim=0, index=tokens)
            out = out.index_add(0, tokens, expert(given) * weights[tokens, place, None])
        return out

    def _twice(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Rows that are picked from picked rows."""
        turned = torch.arange(len(hidden) - 1, -1, -1)
        backwards, out = hidden[turned], torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            tokens, place = (index == e).nonzero(as_tuple=True)
            given = backwards[len(hidden) - 1 - tokens]
            out = out.index_add(0, tokens, expert(given) * weights[tokens, place, None])
        return out

    def _all(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        dense = torch.zeros(len(hidden), len(self.experts)).scatter(1, index, weights)
        return sum((expert(hidden) * dense[:, e, None] for e, expert in enumerate(self.experts)), torch.zeros(()))

    def _repeated(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        wide, flat = hidden.repeat_interleave(self.top_k, 0), index.flatten()
        out = torch.zeros_like(wide)
        for e, expert in enumerate(self.experts):
            out[flat == e] = expert(wide[flat == e])
        return (out.view(len(hidden), self.top_k, -1) * weights[..., None]).sum(1)


class Layer(nn.Module):
    def __init__(self, config: ListedConfig):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = Block(config)

    def forward(self, hidden: Tensor) -> Tensor:
        steps = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        hidden = hidden + self.mix(hidden.cumsum(1) / steps)
        return hidden + self.mlp(nn.functional.layer_norm(hidden, hidden.shape[-1:]))


class Body(nn.Module):
    def __init__(self, config: ListedConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])


class ListedForCausalLM(PreTrainedModel):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig):
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Any = None, use_cache: Any = None) -> Any:
        hidden = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.lm_head(hidden))


def tiny_listed(dispatch: str = "index", seed: int = 0, **changes: Any) -> Any:
    """Build the model in eval mode, weights drawn by `tiny.redraw`; ``changes`` are further config values."""
    return redraw(ListedForCausalLM(ListedConfig(dispatch=dispatch, **changes)).eval(), seed)


class Routed(nn.Module):
    """The block of Mixtral with its own router and an expert per module."""

    def __init__(self, router: nn.Module, fused: Any):
        super().__init__()
        self.gate = router
        sizes = ListedConfig(hidden_size=fused.hidden_dim, intermediate_size=fused.intermediate_dim)
        self.experts = nn.ModuleList([Expert(sizes) for _ in range(fused.num_experts)])
        with torch.no_grad():
            for expert, gate_up, down in zip(self.experts, fused.gate_up_proj, fused.down_proj, strict=True):
                for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
                    getattr(expert, name).weight = nn.Parameter(weight.clone())

    def forward(self, states: Tensor) -> Tensor:
        hidden = states.view(-1, states.shape[-1])
        _, weights, index = self.gate(hidden)
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            tokens, place = (index == e).nonzero(as_tuple=True)
            out.index_add_(0, tokens, expert(hidden[tokens]) * weights[tokens, place, None])
        return out.view_as(states)


def unstacked(model: Any) -> Any:
    """Turn the fused experts of a Mixtral into modules in a list, in place."""
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp.gate, layer.mlp.experts)
    return model
