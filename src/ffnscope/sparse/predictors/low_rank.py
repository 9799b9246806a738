"""Two thin matrices, trained to tell which channels a token needs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN, wide
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, needed


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


@predictor("low_rank", source="Deja Vu (arXiv:2310.17157), PowerInfer (arXiv:2312.12456)")
def low_rank(
    ffn: FFN,
    fit: FitTokens | None,
    *,
    rank: int = 128,
    relu: bool = True,
    lookahead: int = 0,
    density: float = 0.3,
    epochs: int = 20,
) -> Predictor:
    """Two thin matrices, trained on the channels that contribute most.

    Made by `train_low_rank`, which has more options, checkpoints and progress; it stops when the missed mass at
    ``density`` on held-out documents no longer falls.

    Args:
        ffn: the FFN.
        fit: tokens; with ``earlier`` for a lookahead of 1.
        rank: width between the matrices.
        relu: a ReLU between them (PowerInfer, ProSparse), or nothing (Deja Vu).
        lookahead: 0 reads the input of this FFN, 1 that of the FFN one layer before.
        density: share of the channels that are to be told from the others.
        epochs: of training, at most.

    Raises:
        UsageError: no tokens, or an impossible value.
    """
    from ffnscope.sparse.predictors.training import TrainingOptions, train_low_rank

    made = LowRank(ffn, rank, relu=relu, lookahead=lookahead)
    return train_low_rank(made, needed(fit, "low_rank"), TrainingOptions(density=density, epochs=epochs)).predictor


@predictor("deja_vu", source="arXiv:2310.17157")
def deja_vu(
    ffn: FFN, fit: FitTokens | None, *, rank: int = 128, lookahead: int = 0, density: float = 0.3, epochs: int = 20
) -> Predictor:
    """Two thin matrices with nothing between, trained by Deja Vu's published loss, in which positives weigh most.

    Differences: labels are the channels that contribute most, which says something for SiLU and GELU too; rank and
    learning rate fit small models; the epoch that is kept has the least missed mass, not the best recall. The published
    cut at a logit of 0 is a score of 0.5; a calibrated policy takes another one.

    Args:
        ffn: the FFN.
        fit: tokens; with ``earlier`` for a lookahead of 1.
        rank: width between the matrices.
        lookahead: 0 reads the input of this FFN, 1 that of the FFN one layer before.
        density: share of the channels that are to be told from the others.
        epochs: of training, at most.

    Raises:
        UsageError: no tokens, or an impossible value.
    """
    from ffnscope.sparse.predictors.training import TrainingOptions, train_low_rank

    made = LowRank(ffn, rank, relu=False, lookahead=lookahead)
    options = TrainingOptions(density=density, epochs=epochs, loss="published")
    return train_low_rank(made, needed(fit, "deja_vu"), options).predictor
