"""Fidelity to the dense model: how far the pruned model's predictions are from it, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.evaluate.forward import chunk_logits, target_chunks


@torch.no_grad()
def fidelity(dense: Tensor, pruned: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || pruned) and top-1 agreement of the predictions of the targets, summed per window.

    Computed in fp32 (fp64 for fp64 logits), a bounded number of positions at a time. Each position's KL is
    sum_v q - p + p (log p - log q): equal to the usual sum for normalised p and q, exactly 0 for identical logits, and
    insensitive to the rounding of the two normalisers.

    Args:
        dense: logits [b, T, vocab] of the dense model.
        pruned: logits [b, T, vocab] of the pruned model.
        targets: [b, T] bool; the prediction of a target is made one place to its left.

    Returns:
        Sum of the KL in nats per window, [b] fp64, and number of targets at which both models rank the same token
        first, [b] fp64; both on the CPU. KL is infinite where the pruned model excludes a token that the dense model
        allows, NaN where logits are.

    Raises:
        UsageError: the two models have different vocabularies or saw different windows.
    """
    if dense.shape != pruned.shape or dense.shape[:2] != targets.shape:
        raise UsageError(
            f"fidelity compares logits of one shape [b, T, vocab] at targets [b, T]; got dense {tuple(dense.shape)}, "
            f"pruned {tuple(pruned.shape)} and targets {tuple(targets.shape)}. Give both models the same windows."
        )
    kl = torch.zeros(targets.shape, dtype=torch.float64)
    agree = torch.zeros(targets.shape, dtype=torch.float64)
    for rows, columns in target_chunks(targets, dense):
        one, other = chunk_logits(dense, rows, columns), chunk_logits(pruned, rows, columns)
        divergence, same = row_fidelity(one, other)
        kl[rows, columns] = divergence.cpu().double()
        agree[rows, columns] = same.cpu().double()
    return kl.sum(1), agree.sum(1)


def row_fidelity(dense: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || pruned) [n] and whether both rank the same token first [n], of rows of logits [n, vocab]."""
    return _kl(dense.log_softmax(-1), pruned.log_softmax(-1)), _first(dense) == _first(pruned)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n] of rows of log probabilities [n, vocab]; never negative."""
    p = log_p.exp()
    difference = (log_p - log_q).masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, also when q is 0
    return log_q.exp().sub_(p).addcmul_(p, difference).sum(-1).clamp_min(0.0)


def _first(logits: Tensor) -> Tensor:
    """Place of the largest logit, [n] of [n, vocab]; on the CPU faster than argmax."""
    return logits.max(-1).indices
