"""What a model does behind its last block (final norm, LM head), for a few tokens at a time.

The model's own forward is run, in which all blocks pass their input on and the last one puts out the given hidden
states. So whatever stands there (a norm, scaled or capped logits) is computed as always; that it treats tokens one by
one is not assumed but tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ffnscope.calibrate.blocks import Blocks, passing_on, same_values
from ffnscope.calibrate.forward import max_positions
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.offload import resident
from ffnscope.ffn.survey import probe_ids
from ffnscope.ffn.vocabulary import sliced_head, without_embedding

_VALUES = 2**22  # logits of a slice
_ON_ACCELERATOR = 16  # times as many, where a launch costs more than memory does
_TOKENS = 512  # most tokens of a slice


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The head of a model; see `open_head`.

    Attributes:
        blocks: the blocks before it.
        slice_size: tokens that are run at a time.
    """

    blocks: Blocks
    slice_size: int

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Within the context, its offloaded weights are in memory, or read in slices of the vocabulary."""
        model = self.blocks.model
        with sliced_head(model, self.blocks.modules) as sliced, contextlib.ExitStack() as stack:
            spared = [*sliced, *(stack.enter_context(without_embedding(model)) if sliced else ())]
            stack.enter_context(resident(model, *(m for m in _outside(self.blocks) if m not in spared)))
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [m, vocab] of the hidden states [m, d_model] of at most ``slice_size`` tokens, with their graph."""
        model: Any = self.blocks.model
        ids = probe_ids(model, hidden.shape[0])
        with passing_on(self.blocks.modules, self.blocks.lengths, lambda _: hidden[None]):
            return cast("Tensor", model(input_ids=ids, use_cache=False).logits)[0]

    def slices(self, n: int) -> Iterator[slice]:
        """Cut ``n`` tokens into slices."""
        for start in range(0, n, self.slice_size):
            yield slice(start, min(n, start + self.slice_size))


def open_head(blocks: Blocks) -> Head:
    """Return the head of a model whose blocks are open; it must be `frozen`.

    Raises:
        NotAvailableError: for some hidden states it gives other logits than the model, so that it depends on more.
    """
    hidden, logits = blocks.sample
    values = _VALUES * (1 if hidden.device.type == "cpu" else _ON_ACCELERATOR)
    size = max(1, min(values // logits.shape[-1], _TOKENS, max_positions(blocks.model) or _TOKENS))
    head = Head(blocks, size)
    with torch.no_grad(), head.held():
        found = torch.cat([head.logits(hidden[part]) for part in head.slices(len(hidden))])
    whole = torch.ones(len(hidden), dtype=torch.bool)
    finite = bool(torch.isfinite(logits).all())  # otherwise whoever reads the loss tells why
    if found.shape != logits.shape or (finite and not same_values(logits, found, whole)):
        raise NotAvailableError(
            f"{type(blocks.model).__name__} cannot be streamed: what stands behind its blocks gives other logits for "
            "single tokens than within the model. Load it with device_map='auto' instead of stream."
        )
    return head


def _outside(blocks: Blocks) -> list[nn.Module]:
    """Modules beside the blocks that own parameters."""
    inside = {id(part) for block in blocks.modules for part in block.modules()}
    return [
        module
        for module in blocks.model.modules()
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None
    ]
