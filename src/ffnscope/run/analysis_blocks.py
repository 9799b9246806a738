"""The YAML blocks of the analyses: concentration, stability of the core, halo, cross-layer, ablation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from ffnscope.analyze.nulls import LEAST_DRAWS
from ffnscope.run.fields import Block, Count, Distinct, Fraction, Seed, Share, Text
from ffnscope.run.texts import TextSource

Draws = Annotated[StrictInt, Field(ge=LEAST_DRAWS)]


class OtherText(TextSource):
    """A further text of which the core is found, to compare it with that of the calibration."""

    split: Text | None = "train"
    """Part of the text; a local file has none."""


class Stability(Block):
    """Would other text give the same core? Needs supernode.enabled."""

    enabled: StrictBool = False
    """Compare the core with those of both halves of the documents, and with those of the seeds and texts below."""
    seeds: Annotated[tuple[Seed, ...], Distinct] = ()
    """Further seeds that choose the calibration windows; one more pass over text for each."""
    texts: tuple[OtherText, ...] = ()
    """Further texts; one more pass for each."""


class Concentration(Block):
    """How much of each metric's mass the top channels hold."""

    enabled: StrictBool = False
    """Measure shares of the top 1, 5 and 10 %, Lorenz curves, Gini, participation and tails of every metric."""
    draws: Draws = 200
    """Bootstrap draws over documents, at least 200."""
    jackknife: StrictBool = False
    """Intervals also for metrics that are no function of sums of vectors: two further passes over the text."""
    seed: Seed | None = None
    """Seed of the draws; null: experiment.seed."""


class Halo(Block):
    """Are the channels around the core more redundant with it than around other cores? Needs supernode.enabled."""

    enabled: StrictBool = False
    """Compare write halo and read halo with null cores and matched channels."""
    draws: Draws | None = None
    """Null draws, at least 200; null: 20 per FFN, so that a single one can stand out after correction for all."""
    seed: Seed | None = None
    """Seed of the draws; null: experiment.seed."""


class CrossLayer(Block):
    """How the core of a layer reaches the next one. Needs supernode.enabled."""

    enabled: StrictBool = False
    """Compare the core's drive, correlation, redundancy and bus with those of random cores."""
    draws: Draws | None = None
    """Random cores, at least 200; null: 20 per FFN, so that a single one can stand out after correction for all."""
    seed: Seed | None = None
    """Seed of the draws; null: experiment.seed."""


class Ablation(Block):
    """What removing channels does to the loss of the first held-out text, measured. Needs evaluation.enabled."""

    enabled: StrictBool = False
    """Remove core, halos and matched controls, and random masks that hold a share of the core (with supernode.enabled);
    and single channels, where ``channels`` asks for them."""
    num_samples: Count = 8
    """Windows of the held-out text, the first ones."""
    draws: Count = 3
    """Draws of each random set and mask."""
    dose_shares: Annotated[tuple[Share, ...], Distinct] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the core that random masks hold; [] for none."""
    dose_sparsity: Fraction = 0.5
    """Share of the channels that these masks remove."""
    channels: Annotated[StrictInt, Field(ge=0)] = 0
    """Channels that are removed one at a time, to see which metric ranks them as the loss does; 0: none."""
    sites: Count = 8
    """FFNs that these channels are in."""
    copies: Count = 16
    """Windows per forward while single channels are removed, each without another channel; sets memory."""
    seed: Seed | None = None
    """Seed of the draws; null: experiment.seed."""
