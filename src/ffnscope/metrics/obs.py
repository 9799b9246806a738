"""Greedy structured OBS: the order in which channels can go when the others are refitted after every removal.

With h the channels of a token, W the down projection and H = E[h h^T], a refit by least squares of what stays costs
||W_j||^2 / [H^-1]_jj when channel j goes (optimal brain surgeon, Hassibi & Stork 1993, for a whole column). After that,
H^-1 and W are those of the refitted rest, and the next channel is chosen. Only columns' products K = W^T W are needed:

    H^-1 <- H^-1 - r^T r,    K <- K - r^T v - v^T r,    r = [H^-1]_j / sqrt([H^-1]_jj),
    v = u - (K_jj / [H^-1]_jj) r / 2,    u = K_j / sqrt([H^-1]_jj)

Every removal is exact, one channel at a time. Rows are brought up to date when they are chosen and the matrices after
``_PANEL`` removals, by one product, as in a blocked Cholesky factorisation: the complete order costs about 2 d_ff^3
operations, and removing several channels per round (SlimGPT, OSSCAR) would save none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights

_PANEL = 128
_COMPACT = 0.875  # share of the matrices that is left when the rest is dropped
_CHUNK = 512


def _check_damping(*, damping: float = 0.01) -> None:
    if not 0 < damping < math.inf:
        raise UsageError(f"damping must be positive, a share of the mean power of the channels; got {damping:g}.")


@metric("obs", needs=("h_outer",), source="greedy OBS: arXiv:2403.12983, arXiv:2412.18110", check=_check_damping)
def obs(stats: ChannelStats, weights: FFNWeights, *, damping: float = 0.01) -> Tensor:
    """Greedy structured OBS, E||y - y'||^2 that a channel adds when all lower ones are gone; [d_ff], a removal order.

    The lowest channel goes first, and y' is the FFN's output after a least-squares refit of the columns that are left,
    with H = E[h h^T] + damping mean(diag H) I. So any number of lowest channels is a prefix of one nested order.
    Channels that are never active go first. Values are the increases, but where one is below an earlier one it is
    raised to just above it, so that they rise strictly along the order. Errors of different FFNs cannot be compared
    (see ``obs_loss``). Changes under up * c, down / c, because the damping adds a power that does not scale with the
    channel. Of an expert the mean is over its own tokens.

    Args:
        stats: with ``h_outer``; as accurate as it has tokens, more than d_ff of them.
        weights: of the site.
        damping: power that is added to every channel, as a share of their mean power.

    Raises:
        UsageError: a damping that is not positive, or too small for the second moment to be positive definite.
        NonFiniteError: statistics or weights are not finite.
    """
    down = weights.down.double()
    return _scores(stats, down.T @ down, damping)


@metric(
    "obs_loss",
    needs=("h_outer", "dy_outer"),
    source="column form of arXiv:2312.17244; greedy OBS: arXiv:2403.12983",
    check=_check_damping,
)
def obs_loss(stats: ChannelStats, weights: FFNWeights, *, damping: float = 0.01) -> Tensor:
    """Greedy structured OBS in units of the loss, E[(y - y')^T G (y - y')] / 2; [d_ff], a removal order.

    Like ``obs``, but the error of the output is weighed by G = E[dy dy^T], with dy the gradient of the summed token NLL
    with respect to the FFN's output: nats per token, comparable across FFNs, so that the allocator ``global`` may
    rank them together. As in LLM Surgeon, errors and gradients are taken to be independent, and the Hessian of the loss
    is replaced by the second moment of its gradients. Of an expert the mean is over its own tokens.
    Changes under up * c, down / c, because of the damping.
    """
    down, curvature = weights.down.double(), stats.mean("dy_outer")
    return _scores(stats, (0.5 * down.T) @ curvature @ down, damping)


def _scores(stats: ChannelStats, gram: Tensor, damping: float) -> Tensor:
    """Increases along the removal order, strictly rising, at their channels; [d_ff] float64."""
    _check_damping(damping=damping)
    second = stats.mean("h_outer")  # a mean is a new tensor
    power = second.diagonal().clone()
    if not bool(torch.isfinite(power).all() and torch.isfinite(gram.diagonal()).all()):
        raise NonFiniteError(f"{stats.site.name}: the second moment or the weights of down are not finite.")
    live, dead = (power > 0).nonzero().flatten(), (power <= 0).nonzero().flatten()
    order, increases = dead.tolist(), [0.0] * dead.numel()
    if live.numel():
        second.diagonal().add_(damping * power.mean())
        if dead.numel():
            second, gram = second[live][:, live], gram[live][:, live]
        factor, failed = torch.linalg.cholesky_ex(second)
        del second
        if int(failed):
            raise UsageError(
                f"{stats.site.name}: the second moment of the channels is not positive definite; raise damping above "
                f"{damping:g}."
            )
        found, added = removal_order(torch.cholesky_inverse(factor), gram)
        order, increases = order + live[found.to(live.device)].tolist(), increases + added
    scores = torch.empty(power.shape, dtype=torch.float64)
    scores[torch.tensor(order)] = torch.tensor([*_rising(increases)], dtype=torch.float64)
    return scores.to(power.device)


def removal_order(inverse: Tensor, gram: Tensor) -> tuple[Tensor, list[float]]:
    """Order in which all channels go, cheapest first, and what each of them adds to the error.

    Memory beside the arguments: a few hundred rows of a matrix.

    Args:
        inverse: [n, n] float64, inverse of the damped second moment of the channels; overwritten.
        gram: [n, n] float64, products of the columns of down in the metric of the output; overwritten.
    """
    channels = torch.arange(inverse.shape[0])
    gone = inverse.new_zeros(inverse.shape[0])  # infinite where a channel has been removed
    n_left, order, increases = inverse.shape[0], list[Tensor](), list[float]()
    while n_left:
        chosen, rows, mixed = _panel(inverse, gram, gone, increases)
        order.append(channels[chosen])
        n_left -= len(chosen)
        inverse.addmm_(rows.T, rows, alpha=-1)
        gram.addmm_(rows.T, mixed, alpha=-1).addmm_(mixed.T, rows, alpha=-1)
        if n_left <= _COMPACT * channels.numel():
            index = (gone == 0).nonzero().flatten()
            inverse, gram = _compacted(inverse, index), _compacted(gram, index)
            channels, gone = channels[index.to(channels.device)], gone[index]
    return torch.cat(order), increases


def _panel(inverse: Tensor, gram: Tensor, gone: Tensor, increases: list[float]) -> tuple[list[int], Tensor, Tensor]:
    """Choose channels one by one; return them and the rows r and v [k, n] by which the matrices change."""
    size = min(_PANEL, int((gone == 0).sum()))
    rows, mixed = inverse.new_empty(size, inverse.shape[0]), inverse.new_empty(size, inverse.shape[0])
    variance, power = inverse.diagonal().clone(), gram.diagonal().clone()
    variance[gone > 0] = 1
    chosen: list[int] = []
    for k in range(size):
        j = int((power.clamp_min(0) / variance + gone).argmin())
        past, others = rows[:k], mixed[:k]
        root = variance[j].sqrt()
        row = torch.addmv(inverse[j], past.T, past[:, j], alpha=-1) / root
        product = torch.addmv(torch.addmv(gram[j], others.T, past[:, j], alpha=-1), past.T, others[:, j], alpha=-1)
        increase = power[j].clamp_min(0) / variance[j]
        rows[k], mixed[k] = row, product / root - 0.5 * increase * row
        variance.addcmul_(row, row, value=-1)
        power.addcmul_(row, mixed[k], value=-2)
        variance[j], gone[j] = 1, math.inf
        chosen.append(j)
        increases.append(float(increase))
    return chosen, rows, mixed


def _compacted(matrix: Tensor, index: Tensor) -> Tensor:
    """matrix[index][:, index] for a rising index, written over the beginning of the matrix."""
    size = index.numel()
    for first in range(0, size, _CHUNK):
        part = index[first : first + _CHUNK]
        matrix[first : first + part.numel(), :size] = matrix[part][:, index]  # rows from part[0] >= first on
    return matrix[:size, :size]


def _rising(values: Sequence[float]) -> Iterator[float]:
    """The largest value so far, a step above the one before where they are equal."""
    last = -math.inf
    for value in values:
        last = value if value > last else math.nextafter(last, math.inf)
        yield last
