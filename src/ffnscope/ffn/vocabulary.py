"""Embedding and LM head of a streamed model, some rows at a time: they are often larger than any block."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ffnscope.ffn.offload import Stored, is_offloaded, resident, stored
from ffnscope.ffn.streamed import is_streamed

SLICE = 2**24
"""Weights of a slice, if no block has more; an embedding with no more is held whole."""


@contextlib.contextmanager
def sliced_head(model: nn.Module, blocks: Sequence[nn.Module]) -> Generator[list[nn.Module]]:
    """Within the context, an LM head that is larger than every block is read in slices of the vocabulary.

    Logits [n, vocab] are computed slice by slice, and the gradient of the hidden states is the sum of those by the
    slices, so no code of the model, and nobody who reads logits, has to know. The price is that the head is read from
    its file (in practice from the page cache) for each call, twice with gradients; so it is done on the CPU alone,
    where the products take longer than that.

    Yields the modules whose weights need not be held for the head: itself and the input embedding; none where the head
    is no larger than a block, or not a plain linear layer whose weights lie in safetensors or memory.
    """
    head = _head(model)
    place = None if head is None else _place(model, head)
    size = max(SLICE, *(sum(p.numel() for p in block.parameters()) for block in blocks))
    if head is None or place is None or head.weight.numel() <= size:
        yield []
        return
    sliced = _SlicedHead(place, head.out_features, max(1, size // head.in_features))
    own = cast("Tensor | None", head.bias)
    bias = stored(model, head, "bias") if own is not None and is_offloaded(own) else None

    def forward(x: Tensor) -> Tensor:
        logits = cast("Tensor", cast("Any", _Product).apply(x, sliced))
        known = own if bias is None else bias.value
        return logits if known is None else logits + known

    with replaced_forward(head, forward):
        yield [head]


@contextlib.contextmanager
def held_embedding(model: nn.Module) -> Generator[None]:
    """Within the context, the input embedding is read once; of a large one of a streamed model, the rows asked for.

    The latter on the CPU, for a plain `nn.Embedding` whose weights lie in safetensors or memory.
    """
    found: Any = cast("Any", model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    place = None
    if type(found) is nn.Embedding and is_offloaded(found.weight) and is_streamed(model) and found.max_norm is None:
        place = _place(model, found)
    if place is None or found.weight.numel() <= SLICE:
        with resident(model, *([found] if isinstance(found, nn.Module) else [])):
            yield
        return

    def forward(ids: Tensor) -> Tensor:
        index, inverse = ids.unique(return_inverse=True)
        return place.rows(index)[inverse]

    with replaced_forward(found, forward):
        yield


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Generator[None]:
    """Within the context, a module has another forward, behind whose back accelerate reads nothing."""
    before = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            module.forward = before


@contextlib.contextmanager
def without_embedding(model: nn.Module) -> Generator[list[nn.Module]]:
    """Within the context, the input embedding gives zeros, for runs in which nobody reads what it gives; yields it."""
    found: Any = cast("Any", model).get_input_embeddings()
    if not isinstance(found, nn.Embedding) or not is_offloaded(found.weight):
        yield []
        return
    width, dtype = found.weight.shape[1], found.weight.dtype

    def forward(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

    with replaced_forward(found, forward):
        yield [found]


class _SlicedHead:
    """Reads [vocab, d_model] in slices of some rows."""

    def __init__(self, place: Stored, vocab: int, n_rows: int):
        self.place, self.vocab, self.n_rows = place, vocab, n_rows

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.vocab, self.n_rows):
            part = slice(start, min(self.vocab, start + self.n_rows))
            yield part, self.place.rows(part)


class _Product(torch.autograd.Function):
    """x [..., d_model] times the transposed head, and its gradient for x; weights get none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: _SlicedHead) -> Tensor:
        ctx.head = head
        found = x.new_empty(*x.shape[:-1], head.vocab)
        for part, weight in head:
            found[..., part] = x @ weight.T
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = cast("tuple[Tensor]", grads)
        total: Tensor | None = None
        for part, weight in ctx.head:
            one = (g[..., part] @ weight).to(torch.promote_types(g.dtype, torch.float32))
            total = one if total is None else total.add_(one)
        assert total is not None, "a vocabulary has tokens"
        return total.to(g.dtype), None


def _head(model: nn.Module) -> nn.Linear | None:
    found: Any = cast("Any", model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = type(found) is nn.Linear and is_offloaded(found.weight) and is_streamed(model)
    return cast("nn.Linear", found) if plain else None


def _place(model: nn.Module, module: nn.Module) -> Stored | None:
    place = stored(model, module, "weight")
    return place if place.has_rows and place.device.type == "cpu" else None
