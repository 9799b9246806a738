"""Run a model again from one of its blocks on, with what the blocks before it gave kept from an earlier forward."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ffnscope.ffn.probe import layer_path
from ffnscope.types import FFNSite


@dataclass(slots=True)
class Prefix:
    """The blocks before an FFN, and what the last of them gave for one batch.

    Attributes:
        blocks: the blocks in the order of their list; none when the FFN is in the first block, or its block in no list.
        output: what the last of them returned: the residual stream [b, T, d_model], or a tuple that begins with it.
        kinds: type and length of what each of them returned, one entry per call.
    """

    blocks: list[nn.Module]
    output: Any = None
    kinds: list[tuple[type, int]] = field(default_factory=list[tuple[type, int]])

    @property
    def is_known(self) -> bool:
        """Whether each block ran once and all returned the residual stream in one form, so that they can be skipped."""
        return len(self.kinds) == len(self.blocks) and len(set(self.kinds)) < 2 and _stream(self.output) is not None

    @contextlib.contextmanager
    def recording(self) -> Generator[None]:
        """Within the block, a forward of the model fills this."""
        self.output = None
        self.kinds.clear()
        handles = [block.register_forward_hook(self._note) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def skipping(self, copies: int) -> Generator[None]:
        """Within the block, the blocks compute nothing and return what is known, every window ``copies`` times.

        The batch of the forward must be ``copies`` copies of the recorded windows, one copy after the other.
        """
        given = _repeated(self.output, copies)
        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = lambda *args, **kwargs: given  # pyright: ignore[reportUnknownLambdaType]
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.kinds.append((type(output), len(output) if isinstance(output, tuple) else 1))
        if module is self.blocks[-1]:
            self.output = output


def prefix_of(model: nn.Module, sites: Sequence[FFNSite]) -> Prefix:
    """Blocks that run before the first of the blocks with these FFNs, as the list of blocks has them.

    A block is what the first number in a module path counts: ``model.layers.3``. Sites of different lists, or of none,
    have no block in common that could be skipped, and an empty prefix.
    """
    paths = [layer_path(site.path) or "" for site in sites]
    lists = {path.rpartition(".")[0] for path in paths}
    if len(lists) != 1 or not all(paths):
        return Prefix([])
    blocks = dict(model.get_submodule(lists.pop()).named_children())
    first = min(list(blocks).index(path.rpartition(".")[2]) for path in paths)
    return Prefix(list(blocks.values())[:first])


def _stream(output: Any) -> Tensor | None:
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


def _repeated(output: Any, copies: int) -> Any:
    if isinstance(output, tuple):
        return tuple(_repeated(part, copies) for part in output)
    return output.repeat(copies, *(1,) * (output.dim() - 1)) if isinstance(output, Tensor) else output
