"""A sample of channels that stands for all: spread over the FFNs of a model and over the scores of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.types import FFNSite, Scores


@dataclass(frozen=True, slots=True)
class ChannelSample:
    """How many channels are drawn, from how many FFNs.

    Attributes:
        n_channels: channels in all; fewer where the FFNs do not have as many.
        n_sites: FFNs that they come from; fewer where the model does not have as many.
        seed: of the random draws.

    Raises:
        UsageError: fewer than 2 channels, or no FFN, or fewer channels than FFNs.
    """

    n_channels: int = 256
    n_sites: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_channels < 2 or not 1 <= self.n_sites <= self.n_channels:
            raise UsageError(
                "a sample needs at least 2 channels, and at least 1 FFN but no more FFNs than channels; got "
                f"{self.n_channels} channels of {self.n_sites} FFNs."
            )

    def draw(self, scores: Scores) -> dict[FFNSite, Tensor]:
        """Draw channels, the same number from each of some FFNs, one from each of as many quantiles of the score.

        The FFNs are evenly spaced in the order of the model, the first and the last included. Each channel of an FFN is
        drawn with (nearly) the same chance, so that the sample stands for all channels whatever the metric.

        Args:
            scores: any scores of the FFNs; experts without scores (``unreached``) are left out.

        Returns:
            Site -> sorted channels [k] int64; k differs by at most 1 between sites that are wide enough.

        Raises:
            UsageError: no FFN has scores.
        """
        unreached = scores.facts.get("unreached", ())
        every = [site for site in scores.values if site.name not in unreached]
        if not every:
            raise UsageError(f"scores of {scores.metric!r} hold no FFN to draw channels from.")
        random = torch.Generator().manual_seed(self.seed)
        return {
            site: _one_of_each_quantile(scores.values[site], share, random)
            for site, share in self.shares(every).items()
        }

    def shares(self, sites: Sequence[FFNSite]) -> dict[FFNSite, int]:
        """Return the FFNs that channels are drawn from, and how many from each."""
        n = min(self.n_sites, len(sites))
        places = [round(i * (len(sites) - 1) / (n - 1)) for i in range(n)] if n > 1 else [len(sites) // 2]
        each, rest = divmod(self.n_channels, n)
        return {sites[place]: min(sites[place].d_ff, each + (i < rest)) for i, place in enumerate(places)}


def _one_of_each_quantile(values: Tensor, n: int, random: torch.Generator) -> Tensor:
    order = torch.sort(values, stable=True).indices.cpu()
    parts = order.tensor_split(n)
    picked = [part[torch.randint(len(part), (1,), generator=random)] for part in parts]
    return torch.cat(picked).sort().values
