"""Changes of entries of a model's parameters that are taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ffnscope.ffn.offload import edited, is_offloaded
from ffnscope.ffn.projection import Coupled


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """New values of some entries of one parameter.

    Attributes:
        entry: which ones.
        values: in the shape of ``entry``'s selection; None for zeros.
        adds: whether the values are added to what is there.
    """

    entry: Coupled
    values: Tensor | None = None
    adds: bool = False

    @torch.no_grad()
    def write(self, part: Tensor) -> None:
        """Change ``part``, the parameter or the expert's part of it, in place."""
        index = self.entry.index.to(part.device)
        if self.values is None:
            part.index_fill_(self.entry.axis, index, 0)
        elif self.adds:
            part.index_add_(self.entry.axis, index, self.values.to(part))
        else:
            part.index_copy_(self.entry.axis, index, self.values.to(part))


@contextlib.contextmanager
def applied(model: nn.Module, edits: Sequence[Edit]) -> Generator[None]:
    """Within the block, entries have their new values; an offloaded weight is changed whenever it is read.

    On exit the saved entries are copied back, so the model is bit-identical, also after an exception or Ctrl-C. Later
    edits are made over earlier ones. Contexts nest.
    """
    saved: list[tuple[Coupled, Tensor]] = []
    with contextlib.ExitStack() as stack:
        try:
            # of one parameter together: experts share it, and each edit of an offloaded one copies it
            for (module, name), some in _by_parameter(edits).items():
                if is_offloaded(getattr(module, name)):
                    stack.enter_context(edited(model, module, name, partial(_changed, some)))
                else:
                    for edit in some:
                        _write(edit, saved)
            yield
        finally:
            _restore(saved)


def _by_parameter(edits: Sequence[Edit]) -> dict[tuple[nn.Module, str], list[Edit]]:
    found: dict[tuple[nn.Module, str], list[Edit]] = {}
    for edit in edits:
        found.setdefault((edit.entry.module, edit.entry.name), []).append(edit)
    return found


@torch.no_grad()
def _write(edit: Edit, saved: list[tuple[Coupled, Tensor]]) -> None:
    entry, parameter = edit.entry, edit.entry.parameter
    saved.append((entry, parameter.index_select(entry.axis, entry.index.to(parameter.device))))
    edit.write(parameter)


def _changed(edits: Sequence[Edit], value: Tensor) -> Tensor:
    new = value.clone()
    for edit in edits:
        edit.write(edit.entry.part(new))
    return new


@torch.no_grad()
def _restore(saved: list[tuple[Coupled, Tensor]]) -> None:
    """Copy everything back, last first; an interrupt in the middle is raised only when all is back."""
    interrupt: KeyboardInterrupt | None = None
    while saved:
        try:
            while saved:
                entry, values = saved[-1]
                entry.parameter.index_copy_(entry.axis, entry.index.to(values.device), values)
                saved.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
