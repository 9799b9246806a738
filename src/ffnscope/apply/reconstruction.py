"""What a reconstruction is: a plan, and new down columns for the channels that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.types import FFNSite, PruningPlan


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """A plan with what replaces the kept down columns. Data, not action: save it, apply it later.

    Attributes:
        plan: which channels stay.
        down: site -> new columns of the kept channels, [d_model, k].
        bias: site -> what is added to the output of the down projection, [d_model]; empty without a compensation by
            biases.
        facts: how it was made: targets, damping, tokens and errors per site.
    """

    plan: PruningPlan
    down: Mapping[FFNSite, Tensor]
    bias: Mapping[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for what, given in (("down columns", self.down), ("bias", self.bias)):
            for site, value in given.items():
                if site not in self.plan.kept:
                    raise UsageError(f"the reconstruction has a {what} for {site.name}, which is not in its plan.")
                k = self.plan.kept[site].numel()
                expected = (site.d_model, k) if given is self.down else (site.d_model,)
                if value.shape != expected:
                    raise UsageError(
                        f"the {what} of {site.name} have shape {tuple(value.shape)}; expected {expected}, for the {k} "
                        "channels that the plan keeps there."
                    )
