"""What is scored: the FFNs of a model, by metrics, with what some of these need beyond text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ffnscope.analyze.levels import CoreRule
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite, Scores


@dataclass(frozen=True, slots=True)
class Question:
    """What to score on any text.

    Attributes:
        model: gives the weights, and runs over the text; left as it was.
        sites: FFNs to score.
        params: metric -> its parameters.
        rule: what the supernode core is, for metrics that need it.
        reference: the model before fine-tuning, for metrics that need it.
        background: statistics of another text, for metrics that compare two.
    """

    model: nn.Module
    sites: list[FFNSite]
    params: Mapping[str, Mapping[str, Any]]
    rule: CoreRule = field(default_factory=CoreRule)
    reference: nn.Module | None = None
    background: Mapping[FFNSite, ChannelStats] | None = None

    def scores(
        self,
        stats: Mapping[FFNSite, ChannelStats],
        core: Mapping[FFNSite, Tensor] | None,
        facts: Mapping[str, Any] | None = None,
        metrics: Collection[str] | None = None,
    ) -> dict[str, Scores]:
        """Score with all metrics, or only ``metrics``; see `ffnscope.score` for arguments and errors."""
        given: dict[str, Any] = {"facts": facts, "core": core, "reference": self.reference}
        given["background"] = self.background
        chosen = self.params if metrics is None else {m: self.params[m] for m in metrics}
        return {m: score(self.model, stats, m, **given, **p) for m, p in chosen.items()}
