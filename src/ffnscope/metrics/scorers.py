"""Scorers of the LLM-Rank line (arXiv:2410.13299), as classes: one matrix at a time, in the direction of the forward.

A scorer gives one value to every output of a matrix, from the matrix, the activations at both its ends and the
importance of its inputs. `ffnscope.metrics.views` says which matrices these are: in the default mode those of the
channels, in the layerwise mode the projections up and down as LLM-Rank takes them. Nothing here looks downstream: what
happens to an output after this matrix does not change its score.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.metrics.norms import channel_norms, check_order, row_norms
from ffnscope.types import FFNWeights

ARGUMENTS = ("prev_importance", "in_activations", "out_activations", "weight")
"""What `BaseScorer.score` is given, in this order."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One matrix with the activations at its ends.

    Attributes:
        weight: [n_out, n_in], of any sign and floating-point type.
        in_activation: size of each input over the calibration [n_in], not negative.
        out_activation: size of each output [n_out], not negative.
    """

    weight: Tensor
    in_activation: Tensor
    out_activation: Tensor

    def __post_init__(self) -> None:
        n_out, n_in = self.weight.shape
        if self.in_activation.shape != (n_in,) or self.out_activation.shape != (n_out,):
            found = f"{tuple(self.in_activation.shape)} and {tuple(self.out_activation.shape)}"
            raise UsageError(
                f"activations of shape {found} do not fit a weight [{n_out}, {n_in}]; expected ({n_in},) and "
                f"({n_out},)."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """What the channels of one FFN read and write, free of the choice of units between up and down.

    Attributes:
        shares: share of each input in what a channel reads [d_ff, d_model]: |row| over its sum, the mean of gate and
            up. Rows sum to 1 (0 for a row of zeros).
        in_activation: sqrt(E[x^2]) [d_model].
        write: sqrt(E[h^2]) times the L2 norm of the down column [d_ff]: the size of what a channel writes.
        power: sqrt(E[h^2]) [d_ff].
        weights: the FFN's weights.
    """

    shares: Tensor
    in_activation: Tensor
    write: Tensor
    power: Tensor
    weights: FFNWeights


class BaseScorer:
    """A scorer of your own: write ``score``, and hand an instance to a pipeline.

    ``score`` and its argument order are those of LLM-Rank, so that a subclass written for it runs unchanged:

    - ``prev_importance`` [n_in]: importance of the inputs, not negative, with sum 1;
    - ``in_activations`` [n_in], ``out_activations`` [n_out]: sizes over the calibration text, not negative;
    - ``weight`` [n_out, n_in]: absolute values, in float32 or wider whatever the model's type; all four agree in type.

    It returns [n_out], finite and not negative, high = keep.

    Args:
        device: where scores are computed; None = where the weights are.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """Importance of the outputs of one matrix; [n_out]."""
        raise NotImplementedError(f"{type(self).__name__} has no score(self, {', '.join(ARGUMENTS)}).")

    def score_channels(self, prev_importance: Tensor, channels: Channels) -> Tensor:
        """Importance of the channels of one FFN (default mode); [d_ff].

        ``score`` on the matrix whose entry (n, d) is what channel n writes times the share that input d has in what it
        reads, with ``write`` as output activations.
        """
        return self.apply(prev_importance, self.edges(channels))

    @staticmethod
    def edges(channels: Channels) -> Layer:
        """The matrix of the default mode, from the residual channels to the FFN's; [d_ff, d_model]."""
        weight = channels.shares * channels.write.to(channels.shares)[:, None]
        return Layer(weight, channels.in_activation, channels.write)

    def begin(self) -> None:
        """Called once before a model is scored; a scorer that draws random numbers starts again here."""

    def apply(self, prev_importance: Tensor, layer: Layer) -> Tensor:
        """Call ``score`` on one matrix and check what it returns; [n_out] float64, on the CPU.

        Raises:
            UsageError: ``score`` returned another shape, or a value that is negative, NaN or infinite.
            NonFiniteError: so it did because the weight or an activation is NaN or infinite.
        """
        device = torch.device(self.device) if self.device else layer.weight.device
        weight = layer.weight.detach().abs().to(device, torch.promote_types(layer.weight.dtype, torch.float32))
        vectors = (shares_of(prev_importance), layer.in_activation, layer.out_activation)
        given = {k: v.to(weight) for k, v in zip(ARGUMENTS[:3], vectors, strict=True)} | {"weight": weight}
        with torch.no_grad():
            found = _call(self, {k: v.clone() if k != "weight" else v for k, v in given.items()})
        self._check(found, given)
        return found.detach().cpu().double()

    def _check(self, found: Tensor, given: Mapping[str, Tensor]) -> None:
        name, n_out = type(self).__name__, given["weight"].shape[0]
        if found.shape != (n_out,):
            raise UsageError(f"{name}.score returned shape {tuple(found.shape)}; expected ({n_out},), one per output.")
        if not bool(torch.isfinite(found).all()):
            for argument, value in given.items():
                if not bool(torch.isfinite(value).all()):
                    raise NonFiniteError(f"{name}.score was given {argument} that is NaN or infinite.")
        if not bool(torch.isfinite(found).all()) or float(found.min()) < 0:
            raise UsageError(f"{name}.score returned a value that is negative, NaN or infinite; expected sizes >= 0.")


class NormScorer(BaseScorer):
    """p-norm of each row of the weight. In the default mode the product of the norms of gate row, up row, down column.

    Args:
        p: order of the norm, at least 1.
        device: see `BaseScorer`.
    """

    def __init__(self, p: float = 1.0, *, device: str | None = None) -> None:
        check_order(p)
        super().__init__(device)
        self.p = float(p)

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """(sum_j |W_ij|^p)^(1/p); [n_out]."""
        return row_norms(weight, self.p)

    def score_channels(self, prev_importance: Tensor, channels: Channels) -> Tensor:
        """Product of the p-norms of the channel's gate row, up row and down column; [d_ff]."""
        return channel_norms(channels.weights, self.p).prod(0).cpu().double()


class ActivationScorer(BaseScorer):
    """Size of the output over the calibration text."""

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """The output activations themselves; [n_out]."""
        return out_activations


class RandomScorer(BaseScorer):
    """Uniform random values, the floor of every comparison.

    Args:
        seed: of the draws, which run on from matrix to matrix; torch's global random state is left alone.
        device: see `BaseScorer`.
    """

    def __init__(self, seed: int = 0, *, device: str | None = None) -> None:
        super().__init__(device)
        self.seed = seed
        self.begin()

    def begin(self) -> None:
        """Start the draws again."""
        self._generator = torch.Generator().manual_seed(self.seed)

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """Uniform in [0, 1); [n_out]."""
        return torch.rand(weight.shape[0], generator=self._generator).to(weight)


class WandaScorer(BaseScorer):
    """Sum over a row of Wanda's |W_ij| ||x_j||. In the default mode the metric ``wanda``: it reads down, not up."""

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """sum_j |W_ij| in_activation_j; [n_out]."""
        return weight @ in_activations

    def score_channels(self, prev_importance: Tensor, channels: Channels) -> Tensor:
        """sqrt(E[h^2]) times the L1 norm of the down column; [d_ff]."""
        return (channels.power * row_norms(channels.weights.down.T, 1).to(channels.power)).cpu().double()


class WeightedPageRankScorer(BaseScorer):
    """One step of weighted PageRank (Zhang, Wang, Yan 2022, arXiv:2104.02764) from inputs to outputs.

    gamma P p + (1 - gamma) a, where p is the importance of the inputs, a the output activations over their sum, and
    P_ij = theta |W_ij| / sum_i |W_ij| + (1 - theta) B_ij / sum_i B_ij with B = 1 where W is not 0; a column of zeros
    passes nothing on. Not the PageRank of the whole graph: every matrix has a teleport of its own.

    With gamma = 0 it is the activation score; LLM-Rank has that as its default, here it is 0.9. On dense weights theta
    adds a constant, so that the order depends on gamma theta : (1 - gamma) alone. In the default mode the result is
    multiplied by the sum of the output activations, so that scores of different FFNs have one unit.

    Args:
        gamma: weight of the graph in [0, 1] (``alpha`` in networkx); 1 - gamma is that of the activation.
        theta: strength of an edge against its mere existence, in [0, 1].
        device: see `BaseScorer`.

    Raises:
        UsageError: gamma or theta outside [0, 1].
    """

    def __init__(self, gamma: float = 0.9, theta: float = 0.5, *, device: str | None = None) -> None:
        for name, value in (("gamma", gamma), ("theta", theta)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} of weighted PageRank must be in [0, 1]; got {value:g}.")
        super().__init__(device)
        self.gamma, self.theta = float(gamma), float(theta)

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """One step; [n_out], with sum 1 unless inputs or activations are all 0."""
        edges = (weight != 0).to(weight)
        strength = weight @ ratio(prev_importance, weight.sum(0))
        degree = edges @ ratio(prev_importance, edges.sum(0))
        walked = self.theta * strength + (1 - self.theta) * degree
        return self.gamma * walked + (1 - self.gamma) * shares_of(out_activations)

    def score_channels(self, prev_importance: Tensor, channels: Channels) -> Tensor:
        """One step on the channels' matrix, times what all channels write; [d_ff]."""
        found = super().score_channels(prev_importance, channels)
        return found * channels.write.sum().to(found)


class ModifiedPageRankScorer(BaseScorer):
    """Output activation times the sum of |W_ij| over inputs, weighted by their importance.

    In the default mode |W_ij| is the share that an input has in what the channel reads, so that only the activation
    carries a unit.

    Args:
        z_importance: inputs that pruning at ``sparsity`` would remove have no vote: the least important share of them
            (rounded down; of equal ones those of lower index) counts as 0.
        sparsity: that share, in [0, 1]. It has no effect without ``z_importance``.
        device: see `BaseScorer`.

    Raises:
        UsageError: sparsity outside [0, 1].
    """

    def __init__(self, z_importance: bool = False, sparsity: float = 0.3, *, device: str | None = None) -> None:
        if not 0 <= sparsity <= 1:
            raise UsageError(f"sparsity of z_importance must be in [0, 1], a share of the inputs; got {sparsity:g}.")
        super().__init__(device)
        self.z_importance, self.sparsity = z_importance, float(sparsity)

    def score(self, prev_importance: Tensor, in_activations: Tensor, out_activations: Tensor, weight: Tensor) -> Tensor:
        """out_activation_i sum_j |W_ij| p_j; [n_out]."""
        if self.z_importance:
            order = torch.sort(prev_importance, stable=True).indices
            silent = order[: int(len(prev_importance) * self.sparsity)]
            prev_importance = prev_importance.index_fill(0, silent, 0)
        return out_activations * (weight @ prev_importance)

    def score_channels(self, prev_importance: Tensor, channels: Channels) -> Tensor:
        """What a channel writes, times the importance of what it reads; [d_ff]."""
        return self.apply(prev_importance, Layer(channels.shares, channels.in_activation, channels.write))


def _call(scorer: BaseScorer, given: dict[str, Tensor]) -> Tensor:
    """By name, as LLM-Rank calls, or by position when a subclass has names of its own."""
    try:
        inspect.signature(scorer.score).bind(**given)
    except TypeError:
        return scorer.score(*given.values())
    return scorer.score(**given)


def shares_of(values: Tensor) -> Tensor:
    """Values over their sum; zeros stay zeros."""
    return ratio(values, values.sum())


def ratio(values: Tensor, total: Tensor) -> Tensor:
    """Quotient, 0 where the divisor is 0."""
    return torch.where(total > 0, values / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(values))
