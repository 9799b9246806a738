"""Bytes that an FFN reads per decoded token, counted as if its weights were stored in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN
from ffnscope.sparse.predictors.interface import Predictor

WEIGHT_BYTES = 2
"""Bytes of a weight where it is stored; quality is often measured in float32, which must not flatter few bits."""
UNIT = "weights of 16 bits"
"""In what bytes per token are told, in cards, curves, tables and plots."""
FEWEST_BITS, MOST_BITS, GROUP = 2, 8, 64


def matrix_bytes(ffn: FFN, names: tuple[str, ...] = ("gate", "up", "down")) -> int:
    """Bytes of some matrices of an FFN."""
    found: list[Tensor | None] = [getattr(ffn.weights, name) for name in names]
    return sum(_stored(one) for one in found if one is not None)


def predictor_bytes(predictor: Predictor) -> float:
    """Bytes that a predictor reads per token: what it stores, floats in 16 bits, and matrices that it reads in full."""
    read = sum(predictor.ffn.matrix_bytes(name) for name in predictor.reads)
    own = predictor.bytes_read - read
    state: Mapping[str, Tensor] = predictor.state_dict()
    whole = sum(value.numel() * value.element_size() for value in state.values())
    stored = sum(_stored(value) for value in state.values())
    return own * (stored / whole if whole else 1.0) + matrix_bytes(predictor.ffn, tuple(predictor.reads))


def sparse_bytes(predictor: Predictor, density: float) -> float:
    """Bytes read per token by a predictor and by the channels kept at a mean density.

    A matrix that the predictor reads in full is counted once: the runtime takes the products from it
    (`Predictor.score_and_read`), unless gate and up are one fused matrix that runs by projections.
    """
    rest = tuple(name for name in ("gate", "up", "down") if name not in predictor.reads)
    return predictor_bytes(predictor) + density * matrix_bytes(predictor.ffn, rest)


def low_bit_share(bits: int, group: int = GROUP) -> float:
    """Bytes of weights in a few bits, with a step and a lowest value in float16 per group, as a share of 16 bits."""
    return (bits + 32 / group) / 16


def bits_for(share: float, group: int = GROUP) -> int:
    """The most bits per weight, in groups, that take at most a share of the bytes of the dense FFN.

    Raises:
        UsageError: two bits are too many already.
    """
    fitting = [bits for bits in range(FEWEST_BITS, MOST_BITS + 1) if low_bit_share(bits, group) <= share + 1e-9]
    if not fitting:
        raise UsageError(
            f"{share:.1%} of the bytes are fewer than {FEWEST_BITS} bits per weight in groups of {group} take "
            f"({low_bit_share(FEWEST_BITS, group):.1%}); choose a larger share."
        )
    return fitting[-1]


def rank_for(ffn: FFN, share: float, n_matrices: int) -> int:
    """The largest rank at which ``n_matrices`` of the FFN's shape, factored, take at most a share of its bytes.

    Raises:
        UsageError: rank 1 is too much already.
    """
    per_rank = n_matrices * (ffn.d_model + ffn.d_ff) * _itemsize(ffn.weights.up)
    rank = int(share * matrix_bytes(ffn) / per_rank + 1e-9)
    if rank < 1:
        raise UsageError(f"{share:.2%} of the bytes of {ffn.name} are less than {n_matrices} matrices of rank 1 take.")
    return min(rank, ffn.d_model, ffn.d_ff)


def _stored(value: Tensor) -> int:
    return value.numel() * _itemsize(value)


def _itemsize(value: Tensor) -> int:
    return min(value.element_size(), WEIGHT_BYTES)
