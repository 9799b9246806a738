"""SparseGPT (arXiv:2301.00774, algorithm 1): optimal brain surgeon of single weights, with one factor for all rows.

Columns are gone through from left to right. A weight that is removed is made up for by the columns behind it, those
before it being settled: with H the second moment of the inputs and U the upper Cholesky factor of its inverse
(H^-1 = U^T U), the weights w_j.. of a row change by - (w_j / U_jj) U_j.. and the squared error grows by w_j^2 / U_jj^2.
The order is the same for all rows, so they share U. What changes columns behind the current block is applied once per
block, by one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.apply.patterns import Pattern, highest
from ffnscope.errors import NonFiniteError, UsageError

BLOCK_SIZE = 128
DAMPING = 0.01


def sparsegpt(
    weight: Tensor, second: Tensor, pattern: Pattern, *, block_size: int = BLOCK_SIZE, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Choose the weights that stay, and change them so that they make up for the others.

    Unstructured, the mask of a block of columns is chosen when the block begins, over all its rows together: exactly
    the asked share of each block (rounded down) goes. N:M, it is chosen per row when a group of M columns begins.

    Differs from the public code: inputs that are never active (0 in ``second``) get the mean power of the others
    instead of 1, so results do not depend on the scale of the inputs, and their weights are zeroed first but no more of
    them than was asked; the count is exact instead of all weights up to a threshold; float64 (the dtype of ``second``)
    instead of float32.

    Memory beside the arguments: 3 [in, in] and 2 [out, in] in the dtype of ``second``.

    Args:
        weight: [out, in], unchanged.
        second: sum of x x^T over the inputs x [in] of the matrix, or its mean.
        pattern: how many stay; with N:M, ``in`` and ``block_size`` must be multiples of M.
        block_size: columns per block.
        damping: added to the diagonal of ``second``, as a share of its mean.

    Returns:
        The mask [out, in], True = keep, and the new weights [out, in] in the dtype of ``second``, 0 where removed.

    Raises:
        UsageError: widths that are no multiples of M.
        NonFiniteError: the sums or weights are not finite, or the sums are not positive definite.
    """
    width = weight.shape[1]
    if pattern.group is not None and (width % pattern.group[1] or block_size % pattern.group[1]):
        raise UsageError(
            f"{pattern.label} needs a width and a block_size that are multiples; got {width}, {block_size}."
        )
    new = weight.to(second, copy=True)
    keep = torch.ones_like(new, dtype=torch.bool)
    dead = second.diagonal() == 0
    factor = _factor(second, dead, damping)
    for start in range(0, width, block_size):
        part = slice(start, min(start + block_size, width))
        errors = _settle(new[:, part], keep[:, part], factor[part, part], dead[part], pattern)
        new[:, part.stop :] -= errors @ factor[part, part.stop :]
    new.masked_fill_(~keep, 0)
    if not bool(torch.isfinite(new).all()):
        raise NonFiniteError("SparseGPT: the weights hold NaN or infinity.")
    return keep, new


def _factor(second: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Upper triangular U with H^-1 = U^T U, for H with damping."""
    damped = second.clone()
    diagonal = damped.diagonal()
    alive = diagonal[~dead]
    scale = float(alive.mean()) if alive.numel() else 1.0
    diagonal[dead] = scale
    diagonal += damping * float(diagonal.mean())
    # H = R R^T with R upper triangular, by factorising H in reverse order; then U = R^-1
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise NonFiniteError(
            "SparseGPT: the second moment of the inputs is not finite or not positive definite. Look for an overflow "
            "of activations (float16), or raise the damping."
        )
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def _settle(new: Tensor, keep: Tensor, factor: Tensor, dead: Tensor, pattern: Pattern) -> Tensor:
    """Prune the columns of one block in place, and return w_j / U_jj of removed weights, [out, columns]."""
    scale = factor.diagonal()
    errors = torch.zeros_like(new)
    step = new.shape[1] if pattern.group is None else pattern.group[1]
    for first in range(0, new.shape[1], step):
        part = slice(first, first + step)
        scores = (new[:, part] / scale[part]).square().masked_fill(dead[part], 0)
        together = scores if pattern.group is not None else scores.reshape(1, -1)
        keep[:, part] = highest(together, pattern).view(scores.shape)
        for column in range(first, min(first + step, new.shape[1])):
            errors[:, column] = (new[:, column] / scale[column]).masked_fill(keep[:, column], 0)
            new[:, column:] -= errors[:, column, None] * factor[column, column:]
    return errors
