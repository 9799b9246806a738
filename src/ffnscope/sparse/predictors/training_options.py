"""How a low-rank predictor is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ffnscope.errors import UsageError, unknown_name

Loss = Literal["mass", "published"]


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a predictor is trained.

    Attributes:
        density: share of the channels of a token that are positives, those that contribute most, exact zeros never; and
            the density at which the missed mass is judged. A predictor of a card is trained for the density at which
            the best selection meets the target, unless this is given.
        loss: "mass", binary cross-entropy in which a positive weighs its contribution over that of the token's mean
            positive, and a negative 1; or "published", Deja Vu's: positives weigh 1, negatives the share of positives
            in the batch + 0.005. There a logit of 0 means a probability of about the base rate, not of one half.
        epochs: at most.
        patience: epochs without a lower missed mass after which training ends.
        batch_size: tokens per step.
        learning_rate: of AdamW. The published 1e-3 is for 400,000 tokens; with a few thousand it ends too early.
        weight_decay: of AdamW.
        seed: draws fc1 and the order of the tokens, and chooses the documents to judge by.
    """

    density: float = 0.3
    loss: Loss = "mass"
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise unknown_name("loss", self.loss, get_args(Loss))
        if not 0 < self.density < 1:
            raise UsageError(f"density must be in (0, 1), the share of channels to keep; got {self.density:g}.")
        for name in ("epochs", "patience", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be positive; got {getattr(self, name)}.")
