"""Inputs of FFNs as a dense model is run: block by block where it is a chain, otherwise as a whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ffnscope.calibrate.blocks import Blocks, open_blocks
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, NotAvailableError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.offload import materialised
from ffnscope.sparse.ffn import find_activation
from ffnscope.types import FFNSite

HELD_BYTES = 2**30
"""Inputs that are held in memory at a time, where a model is run as a whole."""

OnRound = Callable[[int, int], None]
"""Called after each block (or group of FFNs) with rounds done, and rounds in all."""
Found = dict[FFNSite, "Inputs"]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Inputs of one FFN.

    Attributes:
        x: [n, d_model].
        tokens: which tokens these are [n], or None for all.
        activation: name of the activation function; that of the config for an expert without tokens.
    """

    x: Tensor
    tokens: Tensor | None
    activation: str


def trace_rounds(
    model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Windows], on_round: OnRound | None = None
) -> Generator[Found]:
    """Yield the inputs of some FFNs after the other."""
    with frozen(model), torch.no_grad():
        opened = _open(model, sites, batches)
        if opened is None:
            yield from _whole_rounds(model, sites, batches, on_round)
        else:
            yield from _block_rounds(model, sites, opened, on_round)


def _open(model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Windows]) -> tuple[Blocks, list[Tensor]] | None:
    """The blocks of a model and the hidden states before them, or None where it is no chain."""
    try:
        return open_blocks(model, sites, batches)
    except NotAvailableError:
        return None


def _block_rounds(
    model: nn.Module, sites: Sequence[FFNSite], opened: tuple[Blocks, list[Tensor]], on_round: OnRound | None
) -> Iterator[Found]:
    blocks, hidden = opened
    here = blocks.sites_of(sites)
    last = max(block for block, found in enumerate(here) if found)
    for block in range(last + 1):
        rows = _Rows(model, here[block])
        with blocks.held(block):
            for i, batch in enumerate(blocks.batches):
                with rows.tapped(batch):
                    hidden[i] = blocks.run(block, i, hidden[i])
        if here[block]:
            yield rows.finished()
        if on_round is not None:
            on_round(block + 1, last + 1)


def _whole_rounds(
    model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Windows], on_round: OnRound | None
) -> Iterator[Found]:
    n_tokens = sum(batch.n_tokens for batch in batches)
    size = torch.float32.itemsize * n_tokens * max(site.d_model for site in sites)
    step = max(1, HELD_BYTES // size)
    groups = [sites[start : start + step] for start in range(0, len(sites), step)]
    for done, group in enumerate(groups, 1):
        rows = _Rows(model, group)
        for batch in batches:
            with rows.tapped(batch):
                forward_logits(model, batch)
        yield rows.finished()
        if on_round is not None:
            on_round(done, len(groups))


@dataclass(slots=True, eq=False)
class _Rows:
    """Inputs of some FFNs, batch by batch; those of the first batch are compared with the activations."""

    model: nn.Module
    sites: Sequence[FFNSite]
    x: dict[FFNSite, list[Tensor]] = field(default_factory=dict[FFNSite, list[Tensor]])
    tokens: dict[FFNSite, list[Tensor]] = field(default_factory=dict[FFNSite, list[Tensor]])
    activation: dict[FFNSite, str] = field(default_factory=dict[FFNSite, str])
    n_tokens: int = 0

    def tapped(self, batch: Windows) -> _Tapped:
        """Within the block, the inputs of one batch are noted."""
        return _Tapped(self, batch)

    def finished(self) -> Found:
        """All rows, which are not kept here any longer."""
        found: Found = {}
        for site in self.sites:
            x = torch.cat(self.x.pop(site, [torch.empty(0, site.d_model)]))
            tokens = torch.cat(self.tokens.pop(site, [torch.empty(0, dtype=torch.int64)]))
            name = self.activation.get(site, site.activation)
            found[site] = Inputs(x, None if site.expert is None else tokens, name)
        return found


class _Tapped:
    """One batch of `_Rows`."""

    def __init__(self, owner: _Rows, batch: Windows):
        self.owner, self.batch = owner, batch
        self.rows = TokenRows(batch.valid)
        self.h: dict[FFNSite, Tensor] = {}
        self.new: dict[FFNSite, Tensor] = {}
        unchecked = [site for site in owner.sites if site not in owner.activation]
        keep = (lambda site, h: self.h.__setitem__(site, h.clone())) if unchecked else None
        self.taps = channel_taps(owner.model, owner.sites, keep, None, SignalTap(self._note, ("x",)), self.rows.route)

    def __enter__(self) -> None:
        self.taps.__enter__()

    def __exit__(self, *error: object) -> None:
        self.taps.__exit__(*error)  # type: ignore[arg-type]
        if error[0] is not None:
            return
        for site, x in self.new.items():
            self._add(site, self.rows.take(site, x).clone().cpu())
        self.owner.n_tokens += self.batch.n_tokens

    def _note(self, site: FFNSite, name: str, x: Tensor) -> None:
        self.new[site] = x

    def _add(self, site: FFNSite, x: Tensor) -> None:
        owner = self.owner
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"an input of {site.name} is NaN or infinite. In float16 this is usually an overflow: load the model "
                "in bfloat16 or float32 (model.dtype); otherwise look for NaN in the checkpoint."
            )
        if site not in owner.activation and site in self.h:
            h = self.rows.take(site, self.h[site])
            with materialised(owner.model, site):
                owner.activation[site] = find_activation(owner.model, site, x.to(h.device), h)
        owner.x.setdefault(site, []).append(x)
        if site.expert is not None:
            owner.tokens.setdefault(site, []).append(self.rows.captured(site) + owner.n_tokens)
