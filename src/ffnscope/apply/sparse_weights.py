"""Matrices with single weights set to zero: data that is made once, saved, and applied later.

This is not channel pruning: no channel goes, every tensor keeps its shape, and a checkpoint is as large as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.edits import Edit, applied
from ffnscope.apply.folder import refuse_existing
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.ffn.matrices import Matrix
from ffnscope.io import complete, expect_kind, read_tensors, write_tensors
from ffnscope.types import FFNSite

KIND = "sparse weights"


@dataclass(frozen=True, slots=True, eq=False)
class SparseWeights:
    """Which single weights of a model stay, and what they become.

    Attributes:
        label: "unstructured", or a pattern such as "2:4". Never a sparsity of channels.
        masks: matrix -> bool [out, in], True = keep. Matrices that stay whole are in it too.
        weights: matrix -> new weights [out, in], 0 where removed, for those whose kept weights change (SparseGPT).
        facts: how it was made; ``of`` says what ``sparsity`` is a share of.
    """

    label: str
    masks: Mapping[Matrix, Tensor]
    weights: Mapping[Matrix, Tensor] = field(default_factory=dict[Matrix, Tensor])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for matrix, mask in self.masks.items():
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise UsageError(f"sparse weights: the mask of {matrix.name} must be bool [out, in].")
        for matrix, value in self.weights.items():
            mask = self.masks.get(matrix)
            if mask is None or mask.shape != value.shape:
                raise UsageError(f"sparse weights: {matrix.name} has new weights without a mask of their shape.")
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"sparse weights: {matrix.name} holds NaN or infinity.")
            if bool(value.masked_select(~mask.to(value.device)).any()):
                raise UsageError(f"sparse weights: {matrix.name} has new weights that its mask removes.")

    @property
    def n_weights(self) -> int:
        """Weights in all matrices, removed ones included."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """Fraction of these weights that is removed; ``facts["of"]`` says which weights these are."""
        removed = sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())
        return removed / max(self.n_weights, 1)

    @property
    def sparsities(self) -> dict[str, float]:
        """Name of a matrix -> fraction of its weights that is removed."""
        return {matrix.name: 1 - int(mask.sum()) / mask.numel() for matrix, mask in self.masks.items()}


@contextlib.contextmanager
def sparsified(model: nn.Module, sparse: SparseWeights) -> Generator[nn.Module]:
    """Within the block, removed weights are 0 and changed ones have their new values.

    On exit the model is bit-identical, also after an exception or Ctrl-C. Contexts nest.

    Raises:
        UsageError: made for a model of other shapes.
        LayoutError: a matrix is not in this model.
        NotAvailableError: offloaded weights.
    """
    with applied(model, edits(model, sparse.masks, sparse.weights)):
        yield model


@torch.no_grad()
def sparsify_(model: nn.Module, sparse: SparseWeights) -> nn.Module:
    """Write the zeros and new weights into the model, in place, and return it.

    `save_model` and ``save_pretrained`` then give a stock checkpoint that holds zeros: of the same size as the dense
    one, and not faster unless the runtime has kernels for the pattern.

    Raises:
        UsageError: made for a model of other shapes; this and the following leave the model unchanged.
        LayoutError: a matrix is not in this model.
        NotAvailableError: offloaded weights.
    """
    for edit in edits(model, sparse.masks, sparse.weights):
        edit.write(edit.entry.parameter)
    return model


def edits(model: nn.Module, masks: Mapping[Matrix, Tensor], weights: Mapping[Matrix, Tensor]) -> list[Edit]:
    """The changes of the model's parameters; matrices that stay whole have none."""
    found: list[Edit] = []
    for matrix, mask in masks.items():
        weight = matrix.weight(model)
        if weight.shape != mask.shape:
            raise UsageError(
                f"the sparse weights were made for {matrix.name} of shape {tuple(mask.shape)}; this model has "
                f"{tuple(weight.shape)} there. Use the model that they were made for."
            )
        if matrix in weights:
            found.append(_edit(model, matrix, weights[matrix].to(weight)))
        elif not bool(mask.all()):
            found.append(_edit(model, matrix, weight.masked_fill(~mask.to(weight.device), 0)))
    return found


def _edit(model: nn.Module, matrix: Matrix, weight: Tensor) -> Edit:
    entry, outputs_first = matrix.entry(model)
    return Edit(entry, weight if outputs_first else weight.T)


def write_sparse_weights(path: Path, sparse: SparseWeights, overwrite: bool = False) -> None:
    """Save as safetensors (masks as bool, one byte per weight), with the facts in the header.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
    """
    refuse_existing(path, overwrite)
    parts = {"mask": sparse.masks, "weight": sparse.weights}
    tensors = {f"{what}/{matrix.name}": value for what, values in parts.items() for matrix, value in values.items()}
    matrices = [asdict(matrix) for matrix in sparse.masks]
    achieved = {"sparsity": sparse.sparsity, "sparsities": sparse.sparsities}
    facts = {"label": sparse.label, **achieved, "matrices": matrices, "facts": dict(sparse.facts)}
    write_tensors(path, tensors, {"kind": KIND, **facts})


def read_sparse_weights(path: Path) -> SparseWeights:
    """Load what `write_sparse_weights` wrote; raises ArtifactError for any other file."""
    tensors, facts = read_tensors(path)
    expect_kind(path, facts, KIND)
    with complete(path, KIND):
        matrices = [
            Matrix(row["path"], None if row["site"] is None else FFNSite(**row["site"])) for row in facts["matrices"]
        ]
        masks = {matrix: tensors[f"mask/{matrix.name}"] for matrix in matrices}
        weights = {m: tensors[f"weight/{m.name}"] for m in matrices if f"weight/{m.name}" in tensors}
        return SparseWeights(facts["label"], masks, weights, facts["facts"])
