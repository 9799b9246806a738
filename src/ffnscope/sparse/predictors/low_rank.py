"""Two thin matrices, trained to tell which channels a token needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN, wide
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, by_name, needed
from ffnscope.sparse.predictors.training_options import TrainingOptions


class LowRank(Predictor):
    """sigmoid(fc2 act(fc1 x)): [d_model] -> [rank] -> [d_ff], with nothing or a ReLU between.

    `state_dict` has ``fc1.weight`` [rank, d_model] and ``fc2.weight`` [d_ff, rank] (and perhaps ``fc2.bias``).
    """

    def __init__(self, ffn: FFN, rank: int, *, relu: bool, lookahead: int = 0, bias: bool = False):
        super().__init__(ffn)
        if rank < 1 or lookahead not in (0, 1):
            raise UsageError(f"rank must be at least 1 and lookahead 0 or 1; got {rank} and {lookahead}.")
        self.relu, self.lookahead = relu, lookahead
        device = ffn.weights.up.device
        self.fc1 = cast("nn.Linear", nn.utils.skip_init(nn.Linear, ffn.d_model, rank, bias=False, device=device))
        self.fc2 = cast("nn.Linear", nn.utils.skip_init(nn.Linear, rank, ffn.d_ff, bias=bias, device=device))

    def begin_(self, seed: int) -> None:
        """Random fc1 and fc2 = 0: every channel starts alike."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            draw = torch.randn(self.fc1.weight.shape, generator=random) / self.ffn.d_model**0.5
            self.fc1.weight.copy_(draw)
            for value in self.fc2.parameters():
                value.zero_()

    def logits(self, x: Tensor) -> Tensor:
        """[T, d_model] -> logits [T, d_ff]; 0 is PowerInfer's threshold, a score of 0.5."""
        check_input(self.ffn, x)
        inner = self.fc1(x.to(self.fc1.weight))
        return wide(self.fc2(inner.relu() if self.relu else inner))

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff] in [0, 1]."""
        return self.logits(x).sigmoid()


@predictor("low_rank", source="Deja Vu (arXiv:2310.17157), PowerInfer (arXiv:2312.12456)", options=TrainingOptions)
def low_rank(
    ffn: FFN,
    fit: FitTokens | None,
    *,
    rank: int | Mapping[str, int] = 128,
    relu: bool = True,
    lookahead: int = 0,
    **training: Any,
) -> Predictor:
    """Two thin matrices, trained on the channels that contribute most.

    Made by `train_low_rank`; training stops when the missed mass at the target density on held-out documents no longer
    falls, and goes on from ``fit.checkpoint`` where it was cut off.

    Args:
        ffn: the FFN.
        fit: tokens; with ``earlier`` for a lookahead of 1.
        rank: width between the matrices; or FFN -> width, with "*" for all others.
        relu: a ReLU between them (PowerInfer, ProSparse), or nothing (Deja Vu).
        lookahead: 0 reads the input of this FFN, 1 that of the FFN one layer before.
        training: fields of `TrainingOptions`; without ``density`` it is ``fit.density``, if that is known.

    Raises:
        UsageError: no tokens, or an impossible value.
    """
    made = LowRank(ffn, by_name(rank, ffn, "rank"), relu=relu, lookahead=lookahead)
    return _trained(made, needed(fit, "low_rank"), training)


@predictor("deja_vu", source="arXiv:2310.17157", options=TrainingOptions)
def deja_vu(
    ffn: FFN, fit: FitTokens | None, *, rank: int | Mapping[str, int] = 128, lookahead: int = 0, **training: Any
) -> Predictor:
    """Two thin matrices with nothing between, trained by Deja Vu's published loss, in which positives weigh most.

    Differences: labels are the channels that contribute most, which says something for SiLU and GELU too; rank and
    learning rate fit small models; the epoch that is kept has the least missed mass, not the best recall. The published
    cut at a logit of 0 is a score of 0.5; a calibrated policy takes another one.

    Args:
        ffn: the FFN.
        fit: tokens; with ``earlier`` for a lookahead of 1.
        rank: width between the matrices; or FFN -> width, with "*" for all others.
        lookahead: 0 reads the input of this FFN, 1 that of the FFN one layer before.
        training: fields of `TrainingOptions` but ``loss``; without ``density`` it is ``fit.density``, if that is known.

    Raises:
        UsageError: no tokens, another loss, or an impossible value.
    """
    if training.setdefault("loss", "published") != "published":
        raise UsageError(
            f"deja_vu is trained by its published loss; for the loss {training['loss']!r} use low_rank with relu=false."
        )
    made = LowRank(ffn, by_name(rank, ffn, "rank"), relu=False, lookahead=lookahead)
    return _trained(made, needed(fit, "deja_vu"), training)


def _trained(made: LowRank, fit: FitTokens, training: Mapping[str, Any]) -> Predictor:
    from ffnscope.sparse.predictors.training import train_low_rank

    known: dict[str, Any] = {} if fit.density is None else {"density": fit.density}
    options = TrainingOptions(**{**known, **training})
    return train_low_rank(made, fit, options, checkpoint=fit.checkpoint, on_epoch=fit.on_epoch).predictor
