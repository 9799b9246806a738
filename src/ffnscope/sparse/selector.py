"""A predictor, a policy and its parameter: the selection of one FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import NotAvailableError
from ffnscope.sparse.gap import oracle_gaps
from ffnscope.sparse.measures import Label, TokenMeasures, of_mask, truth_of
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import Predictor
from ffnscope.sparse.products import Products
from ffnscope.sparse.readings import Readings
from ffnscope.types import FFNSite


@dataclass(slots=True, eq=False)
class Noted:
    """The input of an FFN in the forward that runs, for the predictor of the FFN one layer after.

    Attributes:
        x: [T, d_model], or None where it has been read, or has not been noted yet.
    """

    x: Tensor | None = None


class AllChannels:
    """The selection of an FFN that stays dense: x [T, d_model] -> mask [T, d_ff] of ones."""

    def __init__(self, d_ff: int):
        self.d_ff = d_ff

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [T, d_model] -> mask [T, d_ff]."""
        return torch.ones(len(x), self.d_ff, dtype=torch.bool, device=x.device)


class HandsOn(AllChannels):
    """The same, which hands on its input to the predictor of the FFN one layer after."""

    def __init__(self, d_ff: int, own: Noted):
        super().__init__(d_ff)
        self.own = own

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [T, d_model] -> mask [T, d_ff]."""
        self.own.x = x
        return super().__call__(x)


@dataclass(frozen=True, slots=True, eq=False)
class Selector:
    """Which channels of an FFN a token needs: ``selector(x [T, d_model]) -> mask [T, d_ff]``, True = keep.

    Attributes:
        predictor: gives scores.
        policy: selects by them.
        parameter: of the policy, as `calibrate_policy` finds it.
        source: the FFN whose input a predictor reads that looks ahead; None where it is that of its own FFN.
        noted: where that input is put while a model runs; None where nothing runs that does so.
    """

    predictor: Predictor
    policy: Policy
    parameter: float
    source: FFNSite | None = None
    noted: Noted | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Inputs of the FFN [T, d_model] -> mask [T, d_ff]; see `score_and_read`."""
        return self.select_and_read(x)[0]

    @torch.no_grad()
    def select_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """The mask, and products that the predictor has made, which need not be made again."""
        scores, known = self.score_and_read(x)
        return self.of_scores(scores), known

    def score_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """Inputs of the FFN [T, d_model] -> scores [T, d_ff], from the noted input where the predictor looks ahead.

        Raises:
            NotAvailableError: nothing has been noted for these tokens.
        """
        if self.source is None:
            return self.predictor.score_and_read(x)
        return self.predictor(self._taken(len(x))), Products()

    def of_scores(self, scores: Tensor) -> Tensor:
        """Scores [T, d_ff] -> mask [T, d_ff]."""
        return self.policy.select(scores, self.parameter)

    def _taken(self, n_tokens: int) -> Tensor:
        assert self.source is not None
        found = None if self.noted is None else self.noted.x
        if self.noted is None or found is None or len(found) != n_tokens:
            raise NotAvailableError(
                f"the predictor of {self.predictor.ffn.name} reads the input of {self.source.name}, one layer before, "
                "which nothing has handed on. Decode by wrap_(model, card), without never_slower, or use a predictor "
                "with lookahead 0."
            )
        self.noted.x = None
        return found


@torch.no_grad()
def measure_selector(
    selector: Selector | None, predictor: Predictor, readings: Readings, label: Label, chunk: int = 1024
) -> TokenMeasures:
    """Measure a selection (None: all channels) on tokens as its predictor is given them, against FFN and oracle.

    Beside `MEASURES` each of `ffnscope.sparse.gap.GAPS` is measured.
    """
    rows: list[dict[str, Tensor]] = []
    norms = predictor.ffn.down_norms
    for x, seen in readings.chunks(predictor, chunk):
        truth = truth_of(predictor.ffn, x, label, norms)
        mask = torch.ones_like(truth.labels) if selector is None else selector.of_scores(predictor(seen))
        rows.append(of_mask(mask, truth) | oracle_gaps(mask, truth))
    return TokenMeasures({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
