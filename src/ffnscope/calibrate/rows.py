"""Which rows of a signal are counted tokens: not padding, and for an expert only what is routed to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import LayoutError
from ffnscope.types import FFNSite


class TokenRows:
    """Picks the counted tokens of a batch from signals of its sites.

    ``valid`` [batch, T] is False for padding, which is never counted; ``targets`` [batch, T] is True where the
    prediction of a token counts in the loss (only experts and the mark ``target`` need it); ``documents`` [batch] is
    the group of documents of each window (only the mark ``document`` needs it).
    """

    def __init__(self, valid: Tensor, targets: Tensor | None = None, documents: Tensor | None = None):
        self.valid = valid
        self._documents = documents
        self._whole = bool(valid.all())
        self._predicts: Tensor | None = None
        if targets is not None:
            self._predicts = torch.nn.functional.pad(targets[:, 1:], (0, 1)).flatten().cpu()
        self._index: dict[tuple[torch.device, int], Tensor | None] = {}
        self._routed: dict[FFNSite, Tensor] = {}
        self._routed_index: dict[tuple[FFNSite, int], Tensor] = {}

    def route(self, site: FFNSite, tokens: Tensor) -> None:
        """Note that the coming signals of an expert hold these tokens only, [n] indices in batch * T."""
        if int(tokens.max()) >= self.valid.numel():
            raise LayoutError(
                f"{site.name} was given token {int(tokens.max())} of a batch of {tuple(self.valid.shape)}; its tokens "
                "are not those of the text, so its channels are not available."
            )
        if site in self._routed:
            raise LayoutError(f"{site.name} ran twice in one forward; channels of looped experts are not available.")
        self._routed[site] = tokens.cpu()

    def take(self, site: FFNSite, signal: Tensor, every: int = 1) -> Tensor:
        """[batch, T, d_ff] -> [n, d_ff]: every k-th token of each window, counted from its start, without padding.

        A model that flattens tokens before its FFN (OPT) gives [batch * T, d_ff], which is taken as well. Of an expert,
        it is every k-th of the tokens that are routed to it.

        Raises:
            LayoutError: the signal does not hold one row per token of the batch.
        """
        flat = signal.reshape(-1, signal.shape[-1])
        routed = self._routed.get(site)
        if flat.shape[0] != (self.valid.numel() if routed is None else routed.numel()):
            raise LayoutError(
                f"{site.name} was given {flat.shape[0]} rows for a batch of {tuple(self.valid.shape)} = "
                f"{self.valid.numel()} tokens; the channels of an FFN that sees only some tokens are not available."
            )
        if routed is None and self._whole and self.valid.shape[1] % every == 0:
            return flat[::every]
        index = self._indices(signal.device, every) if routed is None else self._routed_indices(site, every)
        return flat if index is None else flat.index_select(0, index.to(flat.device))

    def mark(self, site: FFNSite, name: str) -> Tensor:
        """Of each counted token, [n]: the group of its document ("document"), its window's place in the batch
        ("window"), or whether the next token counts ("target")."""
        if name == "window":
            values = torch.arange(len(self.valid)).repeat_interleave(self.valid.shape[1])
        elif name == "document":
            assert self._documents is not None, "documents were not given"
            values = self._documents.cpu().repeat_interleave(self.valid.shape[1])
        else:
            assert self._predicts is not None, "targets were not given"
            values = self._predicts
        routed = self._routed.get(site)
        return self.take(site, (values if routed is None else values[routed])[:, None])[:, 0]

    def captured(self, site: FFNSite) -> Tensor:
        """Which of the batch's valid tokens the rows of an expert are, [n] indices; none when no token reached it."""
        if site not in self._routed:
            return torch.empty(0, dtype=torch.int64)
        valid = self.valid.flatten().cpu()
        return (valid.cumsum(0) - 1)[self._routed[site][self._routed_indices(site, 1)]]

    def n_targets(self, site: FFNSite) -> int:
        """How many of the tokens that are routed to an expert predict one that counts in the loss."""
        assert self._predicts is not None, "targets were not given"
        return int(self._predicts[self._routed[site]].sum())

    def _indices(self, device: torch.device, every: int) -> Tensor | None:
        key = (device, every)
        if key not in self._index:
            chosen = self.valid.clone()
            chosen[:, torch.arange(chosen.shape[1]) % every != 0] = False
            index = chosen.flatten().nonzero().flatten()
            self._index[key] = None if index.numel() == chosen.numel() else index.to(device)
        return self._index[key]

    def _routed_indices(self, site: FFNSite, every: int) -> Tensor:
        """Rows of an expert's signal: of each window's valid tokens, in their order, the first and each k-th after."""
        if (site, every) not in self._routed_index:
            tokens = self._routed[site]
            rows = self.valid.flatten().cpu()[tokens].nonzero().flatten()
            if every > 1:
                rows = rows[tokens[rows].argsort(stable=True)]
                window = tokens[rows] // self.valid.shape[1]
                rank = torch.arange(rows.numel()) - torch.searchsorted(window, window)
                rows = rows[rank % every == 0]
            self._routed_index[site, every] = rows
        return self._routed_index[site, every]
