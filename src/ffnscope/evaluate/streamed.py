"""Evaluation of a streamed model: all windows go through one block after the other, then through the head in slices."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnscope.calibrate.blocks import Blocks, trace_blocks
from ffnscope.calibrate.head import Head, open_head
from ffnscope.calibrate.head_pass import next_labels
from ffnscope.calibrate.states import HiddenStates
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import LayoutError
from ffnscope.evaluate.fidelity import row_fidelity
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.streamed import waiting_place
from ffnscope.ffn.survey import nothing_found, survey

OnShare = Callable[[int, int], None]
_DENSE = -1  # block in the key of what the dense model put out


@dataclass(frozen=True, slots=True, eq=False)
class StreamedText:
    """Windows that go through the blocks of a streamed model as often as is asked; see `streamed_text`.

    Attributes:
        blocks: the model's, with the batches.
        head: what stands behind them.
        states: hidden states of all batches.
    """

    blocks: Blocks
    head: Head
    states: HiddenStates

    def nll(self, on_share: OnShare | None = None) -> list[dict[str, Tensor]]:
        """Of each batch the sum of the NLL of each window's targets, "nll" [b] fp64, of the model as it is now."""
        self._advance(on_share)
        found: list[dict[str, Tensor]] = []
        with torch.no_grad(), self.head.held():
            for i in range(len(self.blocks.batches)):
                self.states.put((_DENSE, i), self.states.pop((len(self.blocks.names), i)))
                found.append(self._sums(i, dense=None))
        return found

    def fidelity(self, on_share: OnShare | None = None) -> list[dict[str, Tensor]]:
        """The same, and "kl" to and "agree" with the model that `nll` was called for last; see `fidelity`."""
        self._advance(on_share)
        found: list[dict[str, Tensor]] = []
        with torch.no_grad(), self.head.held():
            for i in range(len(self.blocks.batches)):
                pruned = self.states.pop((len(self.blocks.names), i))
                found.append(self._sums(i, dense=pruned))
        return found

    def _advance(self, on_share: OnShare | None) -> None:
        n = len(self.blocks.batches)
        total = n * len(self.blocks.names)
        with torch.no_grad():
            for block in range(len(self.blocks.names)):
                with self.blocks.held(block):
                    for i in range(n):
                        hidden = self.states.get((0, i)) if block == 0 else self.states.pop((block, i))
                        self.states.put((block + 1, i), self.blocks.run(block, i, hidden))
                        if on_share is not None:
                            on_share(block * n + i + 1, total)

    def _sums(self, batch: int, dense: Tensor | None) -> dict[str, Tensor]:
        """Sums per window of one batch: of the dense model, or of ``dense``, hidden states of another, beside it."""
        windows = self.blocks.batches[batch]
        labels = next_labels(windows)
        index = (labels >= 0).nonzero().flatten()
        window = index // windows.length
        known = self.states.get((_DENSE, batch)).flatten(0, 1)
        other = None if dense is None else dense.flatten(0, 1)
        names = ("nll",) if other is None else ("nll", "kl", "agree")
        sums = {name: torch.zeros(len(windows), dtype=torch.float64) for name in names}
        for part in self.head.slices(len(index)):
            first = self._logits(known, index[part])
            shown = first if other is None else self._logits(other, index[part])
            wanted = labels[index[part], None].to(shown.device)
            values = {"nll": -shown.log_softmax(-1).gather(-1, wanted)[:, 0]}
            if other is not None:
                values["kl"], values["agree"] = row_fidelity(first, shown)
            for name, value in values.items():
                sums[name].index_add_(0, window[part], value.cpu().double())
        return sums

    def _logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        logits = self.head.logits(hidden[index.to(hidden.device)])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def shares_as_batches(on_batch: OnShare | None, n_batches: int) -> OnShare | None:
    """A callback for runs of blocks that tells them as batches, each of which is many runs."""
    if on_batch is None:
        return None
    return lambda done, total: on_batch(done * n_batches // total, n_batches) if done * n_batches % total == 0 else None


@contextlib.contextmanager
def streamed_text(model: nn.Module, batches: Sequence[Windows]) -> Generator[StreamedText]:
    """Open the blocks and the head of a streamed model for these batches.

    Memory: one block, or the head; hidden states [n_tokens, d_model] of all windows where the model lets them wait,
    once as they enter the blocks, once on their way, and once as they left the dense model.

    Raises:
        NotAvailableError: the model is no chain of blocks with a head that treats tokens one by one.
        LayoutError: no FFN was found, by which the blocks are recognised.
    """
    found = survey(model)
    if not found.sites:
        raise LayoutError(str(nothing_found(model, found)))
    place, folder = waiting_place(model)
    with frozen(model), HiddenStates(place, folder) as states:
        number = itertools.count()
        blocks = trace_blocks(model, found.sites, batches, lambda hidden: states.put((0, next(number)), hidden))
        yield StreamedText(blocks, open_head(blocks), states)
