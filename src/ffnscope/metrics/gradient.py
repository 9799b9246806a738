"""The SCAR family: metrics of activation h and gradient g = d(summed token NLL) / dh.

Sums over tokens are divided by the number of predicted tokens. The loss is summed, never averaged over a text, so a
token weighs the same whatever the length of its text; the public NodeLens code takes gradients of per-text means, which
weighs a token by 1 / T^2 and lets short lines dominate.

Products of h and g do not change when a channel's up row is scaled by c and its down column by 1/c, which leaves a
gated FFN as it is: h grows by c and g shrinks by it. Powers of h or g alone do.
"""

from __future__ import annotations

from torch import Tensor

from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights

SCAR = "arXiv:2604.23475, with a length-invariant loss"


@metric("scar_activation_power", needs=("act_sq",), source=SCAR)
def scar_activation_power(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Activation power, E[h^2]; [d_ff], over all calibration tokens. Scales with c^2 under up * c, down / c."""
    return stats.mean("act_sq")


@metric("scar_taylor", needs=("taylor_abs",), source=SCAR)
def scar_taylor(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """First-order effect per token, E[|h g|]; [d_ff], nats per predicted token. Invariant under up * c, down / c."""
    return stats.mean("taylor_abs")


@metric("scar_curvature", needs=("grad_sq",), source=SCAR)
def scar_curvature(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Gradient power, E[g^2].

    [d_ff]. Equals E[(v^T dL/dy)^2] for the channel's down column v and FFN output y. Scales with 1/c^2 under up * c,
    down / c.
    """
    return stats.mean("grad_sq")


@metric("scar_loss_proxy", needs=("taylor_sq",), source=SCAR)
def scar_loss_proxy(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Loss proxy (LP), E[(h g)^2] / 2.

    [d_ff], the diagonal empirical-Fisher estimate of the loss of zeroing the channel at one token. Invariant under
    up * c, down / c.
    """
    return 0.5 * stats.mean("taylor_sq")


@metric("scar_loss_proxy_factored", needs=("act_sq", "grad_sq"), source=SCAR)
def scar_loss_proxy_factored(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Factored loss proxy, E[h^2] E[g^2] / 2.

    [d_ff], what LP would be if h^2 and g^2 were uncorrelated. Invariant under up * c, down / c. E[h^2] is over all
    calibration tokens, also those that did not run backward.
    """
    return 0.5 * stats.mean("act_sq") * stats.mean("grad_sq")


@metric("llm_pruner", needs=("taylor_sum",), source="arXiv:2305.11627 (vector-wise Taylor), from signed token sums")
def llm_pruner(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """First-order effect of removing the channel, |E[h g]|; [d_ff], nats per predicted token.

    The vector form of the Taylor score of the coupled weights: sum_o W_down[o, j] dL/dW_down[o, j] is the token sum of
    h g, and so is the up row's sum of weight times gradient in a gated FFN without biases. No weight gradient is made.
    Unlike ``scar_taylor``, signs cancel between tokens. Invariant under up * c, down / c.
    """
    return stats.mean("taylor_sum").abs()
