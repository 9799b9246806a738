"""Metrics of how a channel's input weights lie in the distribution of the FFN input x."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights


@metric("rayleigh_quotient", needs=("x_sum", "x_outer"), source="arXiv:2604.23475 (baseline), per token, fp64 sums")
def rayleigh_quotient(stats: ChannelStats, weights: FFNWeights, *, relative: bool = True) -> Tensor:
    """Rayleigh quotient w^T C w / w^T w of the channel's input rows, C the covariance of the FFN input over tokens.

    [d_ff]: the mean over the gate and the up row, each in [0, largest eigenvalue]; with ``relative`` divided by the
    trace of C. A zero row counts 0. Invariant under up * c, down / c, since no scaling of a row changes it and the down
    projection is not read. The public NodeLens code takes C over texts after averaging tokens, which has at most as
    many dimensions as there are texts.
    """
    return _mean_quotient(_rows(weights), covariance(stats, "x_outer", "x_sum"), relative)


@metric("delta_alignment", needs=("x_sum", "x_outer"), source="arXiv:2604.23475 (baseline)", inputs=("reference",))
def delta_alignment(
    stats: ChannelStats, weights: FFNWeights, *, reference: FFNWeights, relative: bool = True
) -> Tensor:
    """Rayleigh quotient of the change of the channel's input rows since a reference checkpoint.

    [d_ff]: like ``rayleigh_quotient`` with the rows replaced by their difference from ``reference`` (the model before
    fine-tuning). A row that did not change counts 0. Changes under up * c, down / c, unless the reference is rescaled
    too.
    """
    pairs = zip(_rows(weights), _rows(reference), strict=True)
    wide = torch.promote_types(torch.promote_types(weights.up.dtype, reference.up.dtype), torch.float32)
    changed = [w.to(wide) - r.to(w.device, wide) for w, r in pairs]
    return _mean_quotient(changed, covariance(stats, "x_outer", "x_sum"), relative)


def covariance(stats: ChannelStats, outer: str, total: str) -> Tensor:
    """Covariance over tokens (population form, float64) from a sum of outer products and a sum."""
    mean = stats.mean(total)
    return stats.mean(outer) - torch.outer(mean, mean)


def _rows(weights: FFNWeights) -> list[Tensor]:
    return [w for w in (weights.gate, weights.up) if w is not None]


def _mean_quotient(rows: list[Tensor], cov: Tensor, relative: bool) -> Tensor:
    trace = cov.diagonal().sum()
    if relative and float(trace) > 0:
        cov = cov / trace
    found = [_quotient(w.to(torch.promote_types(w.dtype, torch.float32)), cov) for w in rows]
    return torch.stack(found).mean(0)


def _quotient(rows: Tensor, cov: Tensor) -> Tensor:
    norm = rows.square().sum(1)
    value = ((rows @ cov.to(rows)) * rows).sum(1).clamp_min(0)
    return torch.where(norm > 0, value / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))
