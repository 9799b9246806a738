"""Forwards of a streamed model that need few of its weights: those that only look how it is built."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from ffnscope.ffn.offload import is_offloaded
from ffnscope.ffn.projection import is_projection, out_width
from ffnscope.ffn.streamed import is_streamed
from ffnscope.ffn.vocabulary import held_embedding, replaced_forward


@contextlib.contextmanager
def unread_projections(model: nn.Module) -> Generator[None]:
    """Within the context, no projection of a streamed model is read: each puts out zeros.

    For forwards in which somebody replaces what projections put out. Of a large embedding, the rows asked for are read.
    A subclass of ``nn.Linear``, whose own forward may return anything, runs as it is.
    """
    with _unread(model, [m for m in model.modules() if is_projection(m)] if is_streamed(model) else []):
        yield


@contextlib.contextmanager
def unread_head(model: Any) -> Generator[None]:
    """Within the context, the LM head of a streamed model puts out zeros, for forwards whose logits nobody reads."""
    with _unread(model, [model.get_output_embeddings()] if is_streamed(model) else []):
        yield


@contextlib.contextmanager
def _unread(model: nn.Module, modules: list[nn.Module]) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        if is_streamed(model):
            stack.enter_context(held_embedding(model))
        for module in modules:
            if _is_plain(module):
                stack.enter_context(replaced_forward(module, _zeros(out_width(module))))
        yield


def _is_plain(module: nn.Module) -> bool:
    known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return known and is_offloaded(module.weight)  # type: ignore[arg-type]


def _zeros(width: int) -> Any:
    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], width)

    return forward
