"""One pass over the blocks of a model that makes their matrices sparse.

As in the public code of Wanda, SparseGPT and DaSS, a block runs on what the sparse blocks before it put out, all its
matrices are made sparse from that one run, and it runs once more with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.edits import applied
from ffnscope.apply.patterns import Pattern
from ffnscope.apply.sparse_weights import SparseWeights, edits
from ffnscope.apply.targets import OF, InputSums, Target, Targets, check_inputs, summed
from ffnscope.calibrate.blocks import open_blocks
from ffnscope.calibrate.forward import memory_errors
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.matrices import Matrix

OnBlock = Callable[[int, int], None]
Masked = tuple[Tensor, Tensor | None]
"""A mask [out, in], and new weights where kept ones change."""
Decide = Callable[[Target, Tensor, Mapping[str, Tensor]], Masked]
"""Given a matrix, its weights [out, in] and sums per signal."""


class BlockRun:
    """One pass over the blocks of a model, each on what the sparse blocks before it put out."""

    def __init__(self, model: nn.Module, windows: Windows, targets: Targets, batch_size: int, on_block: OnBlock | None):
        check_inputs(targets)
        if len(windows) == 0 or batch_size < 1:
            raise UsageError(
                f"unstructured sparsity needs windows of text in batches of at least 1; got {len(windows)} windows and "
                f"batch_size {batch_size}."
            )
        self.model, self.windows, self.targets, self.on_block = model, windows, targets, on_block
        self.batches = list(windows.batches(batch_size))
        self.masks: dict[Matrix, Tensor] = {}
        self.weights: dict[Matrix, Tensor] = {}
        self.whole: list[str] = []
        self.few: dict[str, tuple[int, int]] = {}

    def result(
        self, method: str, pattern: Pattern, decide: Decide, *, outer: bool, facts: Mapping[str, Any]
    ) -> SparseWeights:
        """Go through the blocks; ``outer`` asks for second moments instead of squares of the inputs."""
        message = "out of memory in making weights sparse. Lower batch_size, or use less text."
        with frozen(self.model), torch.no_grad(), memory_errors(message):
            blocks, hidden = open_blocks(self.model, self.targets.sites, self.batches)
            for block, name in enumerate(blocks.names):
                targets = self.targets.inside(name)
                sums = InputSums(outer)
                with blocks.held(block):
                    for batch, windows in enumerate(self.batches):
                        with summed(self.model, targets, self.targets.scope, windows.valid, sums):
                            blocks.run(block, batch, hidden[batch])
                sums.check()
                self._decide(targets, decide, sums)
                del sums
                if block < len(blocks.names) - 1:
                    here = {t.matrix: self.masks[t.matrix] for t in targets}
                    with applied(self.model, edits(self.model, here, self.weights)), blocks.held(block):
                        for batch, one in enumerate(hidden):  # in the list, so that states are held once
                            hidden[batch] = blocks.run(block, batch, one)
                if self.on_block is not None:
                    self.on_block(block + 1, len(blocks.names))
        self._warn()
        text = {"text": self.windows.hash, "windows": len(self.windows), "tokens": self.windows.n_tokens}
        more = {**facts, **text, "whole": self.whole}
        return labelled(self.model, method, pattern, self.targets, self.masks, more, self.weights)

    def _decide(self, targets: list[Target], decide: Decide, sums: InputSums) -> None:
        for target in targets:
            matrix = target.matrix
            weight = finite(matrix, matrix.weight(self.model))
            if target.signal not in sums.sums:  # an expert without tokens, or a module that does not run
                self.masks[matrix] = torch.ones(weight.shape, dtype=torch.bool)
                self.whole.append(matrix.name)
                continue
            if sums.outer and sums.tokens[target.signal] < 4 * weight.shape[1]:
                self.few[matrix.name] = sums.tokens[target.signal], weight.shape[1]
            try:
                mask, new = decide(target, weight, sums.sums)
            except NonFiniteError as error:
                raise NonFiniteError(f"{matrix.name}: {error}") from error
            self.masks[matrix] = mask.cpu()
            if new is not None and not bool(mask.all()):
                self.weights[matrix] = new.to(weight.dtype).cpu()

    def _warn(self) -> None:
        if self.few:
            name, (tokens, width) = min(self.few.items(), key=lambda row: row[1][0] / row[1][1])
            warnings.warn(
                f"the second moments of {len(self.few)} of {len(self.masks)} matrices are of fewer than 4 tokens per "
                f"input ({name}: {tokens} tokens for {width} inputs), so new weights fit noise. Use more text.",
                stacklevel=4,
            )
        if self.whole:
            warnings.warn(
                f"{len(self.whole)} of {len(self.masks)} matrices were reached by no token ({self.whole[0]}); they "
                "stay whole. Use more text.",
                stacklevel=4,
            )


def finite(matrix: Matrix, weight: Tensor) -> Tensor:
    """The weights; raises NonFiniteError where one is not finite."""
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{matrix.name} holds NaN or infinity. Load the model from an intact checkpoint.")
    return weight


def labelled(
    model: nn.Module,
    method: str,
    pattern: Pattern,
    targets: Targets,
    masks: Mapping[Matrix, Tensor],
    facts: Mapping[str, Any],
    weights: Mapping[Matrix, Tensor] | None = None,
) -> SparseWeights:
    """The result, with what every method tells about itself."""
    removed = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    about = {
        "method": method,
        "kind": pattern.label,
        "scope": targets.scope,
        "of": OF[targets.scope],
        "asked": pattern.sparsity,
        "share_of_all_parameters": removed / max(sum(p.numel() for p in model.parameters()), 1),
        "size": "unchanged: zeros are stored, and no speed-up comes without kernels for the pattern",
    }
    return SparseWeights(pattern.label, masks, weights or {}, {**about, **facts})
