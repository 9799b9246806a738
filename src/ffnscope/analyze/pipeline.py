"""Pipelines of the LLM-Rank line (arXiv:2410.13299): calibrate, score by a scorer, decide by a pruner.

They compose the same public functions as everything else and change no model: what comes out are `Scores` and a
`PruningPlan`, which `masked` tries and `prune_` carries out. Metrics of the same names as the scorers
(``weighted_pagerank``, ``layerwise_weighted_pagerank_chained``, ...) do this from the command line and from YAML.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import OnBatch, PassOptions, collect, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.ffn.graph import decoder_graph
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.metrics.scorers import BaseScorer
from ffnscope.metrics.views import (
    CHANNEL_CHAIN_NEEDS,
    CHANNEL_NEEDS,
    ROW_CHAIN_NEEDS,
    ChannelView,
    ProjectionView,
    Ranked,
    View,
    ffn_steps,
    rank_chain,
)
from ffnscope.plan.pruners import BasePruner, RankedLayer, plan_by_pruner, row_masks
from ffnscope.scoring import naming_weights, warn_unreached
from ffnscope.types import ChannelStats, FFNSite, PruningPlan, Scores

Steps = Sequence[Sequence[FFNSite]]
"""FFNs in the order of the model; those of one step, as the experts of a layer, are beside each other."""


@dataclass(frozen=True, slots=True, eq=False)
class PipelineResult:
    """What a pipeline found.

    Attributes:
        scores: of every channel, high = keep.
        plan: which channels stay.
        residual_scores: layerwise mode only: site -> scores of the rows of down [d_model].
        residual_masks: layerwise mode only: site -> rows of down that LLM-Rank would leave, True = keep [d_model].
            These rows are residual channels, which no plan removes.
    """

    scores: Scores
    plan: PruningPlan
    residual_scores: Mapping[FFNSite, Tensor]
    residual_masks: Mapping[FFNSite, Tensor]


class BasePipeline:
    """A pipeline of your own: write ``chains``, which says which FFNs pass importance on to which.

    In the default mode a channel is gate row, up row and down column, its signal is h, after the gate, and the pruner
    is given all FFNs at once, one layer each. A scorer reads nothing that a rescaling of up and down changes.

    With ``layerwise`` the public LLM-Rank code is reproduced, with its faults: rows of up are scored by W_up x before
    the gate, whatever the down column does; no scorer looks downstream; weighted PageRank with gamma = 0 is the
    activation score; scores of each matrix sum to 1; and the pruner also cuts rows of down, which are residual
    channels. The plan takes the rows of up alone; the others are told in the result.

    Args:
        model: a causal LM; left as it was.
        windows: calibration text (`load_windows`).
        scorer: see `BaseScorer`.
        pruner: see `BasePruner`.
        layerwise: see above.
        tracked: patterns of the FFNs to rank (`select_sites`); None = all.
        options: sizes of the calibration pass.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Windows,
        scorer: BaseScorer,
        pruner: BasePruner,
        *,
        layerwise: bool = False,
        tracked: Sequence[str] | None = None,
        options: PassOptions | None = None,
    ) -> None:
        self.model, self.windows, self.scorer, self.pruner = model, windows, scorer, pruner
        self.layerwise, self.tracked, self.options = layerwise, tracked, options

    def chains(self, steps: Steps) -> Sequence[Steps]:
        """Split all FFNs into chains; within one, each step reads what the step before passes on."""
        raise NotImplementedError(f"{type(self).__name__} has no chains(self, steps).")

    def run(self, on_batch: OnBatch | None = None) -> PipelineResult:
        """Calibrate, score and decide. The model and the arguments stay as they are; a second run gives the same.

        Args:
            on_batch: called with (tokens done, tokens in all) after each batch of the calibration.

        Raises:
            UsageError: chains leave FFNs out, a scorer or pruner returns what cannot be, or a plan would remove all
                channels of an FFN.
            NonFiniteError, DeviceError: see `calibrate`.
        """
        sites = find_sites(self.model, self.tracked)
        chains = self.chains(ffn_steps(decoder_graph(self.model, sites)))
        self._check_chains(chains, sites)
        with naming_weights(self.model):
            stats = collect(
                self.model,
                self.windows,
                self._needs(chains),
                sites=sites,
                options=self.options,
                on_batch=on_batch,
            )
            ranked = self._rank(chains, stats)
            scores = self._scores(sites, ranked)
        masks, residual_masks = self._masks(chains, ranked)
        whole = {s: torch.arange(s.d_ff) for s in sites if s not in ranked}
        plan = plan_by_pruner(scores, self.pruner, masks, whole)
        residual = {s: r.residual for s, r in ranked.items() if self.layerwise and r.residual is not None}
        return PipelineResult(scores, plan, residual, residual_masks)

    def _needs(self, chains: Sequence[Steps]) -> tuple[str, ...]:
        """Statistics to collect."""
        if self.layerwise:
            return ROW_CHAIN_NEEDS
        return CHANNEL_CHAIN_NEEDS if any(len(chain) > 1 for chain in chains) else CHANNEL_NEEDS

    def _check_chains(self, chains: Sequence[Steps], sites: Sequence[FFNSite]) -> None:
        found = [site.name for chain in chains for step in chain for site in step]
        wrong = {s.name for s in sites} ^ set(found) or {name for name in found if found.count(name) > 1}
        if wrong:
            raise UsageError(
                f"{type(self).__name__}.chains must hold every FFN once; {sorted(wrong)[0]} is missing, unknown or "
                "there more than once."
            )

    def _rank(self, chains: Sequence[Steps], stats: Mapping[FFNSite, ChannelStats]) -> dict[FFNSite, Ranked]:
        """Score all FFNs that had tokens."""
        n_tokens = {site: part.n_tokens for site, part in stats.items()}
        view = ProjectionView if self.layerwise else ChannelView

        @contextmanager
        def opened(site: FFNSite) -> Generator[View]:
            with materialised(self.model, site):
                yield view(stats[site], weights_of(self.model, site))

        self.scorer.begin()
        found: dict[FFNSite, Ranked] = {}
        for chain in chains:
            found |= rank_chain(self.scorer, chain, opened, n_tokens, last=self.layerwise)
        return found

    def _scores(self, sites: Sequence[FFNSite], ranked: Mapping[FFNSite, Ranked]) -> Scores:
        """Scores in the order of the model; zeros for experts without tokens."""
        name = type(self.scorer).__name__
        plain = {k: v for k, v in vars(self.scorer).items() if not k.startswith("_")}
        facts: dict[str, Any] = {
            "pipeline": type(self).__name__,
            "layerwise": self.layerwise,
            "params": {k: v for k, v in plain.items() if isinstance(v, bool | int | float | str)},
            "model": weights_hash(self.model),
            "calibration": self.windows.hash,
        }
        unreached = [site.name for site in sites if site not in ranked]
        if unreached:
            warn_unreached(name, unreached, sites, stacklevel=4)
            facts["unreached"] = unreached
        zeros = {s: torch.zeros(s.d_ff, dtype=torch.float64) for s in sites if s not in ranked}
        return Scores(name, {s: zeros[s] if s in zeros else ranked[s].channels for s in sites}, facts)

    def _masks(
        self, chains: Sequence[Steps], ranked: Mapping[FFNSite, Ranked]
    ) -> tuple[dict[FFNSite, Tensor], dict[FFNSite, Tensor]]:
        """Ask the pruner: rows that stay of up (the channels), and in the layerwise mode of down.

        In the layerwise mode it is asked chain by chain, as LLM-Rank does: there "global" is over one chain.
        """
        every = [[site for step in chain for site in step if site in ranked] for chain in chains]
        if not self.layerwise:
            sites = [site for chain in every for site in chain]
            masks = row_masks(self.pruner, [self._layer(s, "up", ranked[s].channels) for s in sites])
            return dict(zip(sites, masks, strict=True)), {}
        up: dict[FFNSite, Tensor] = {}
        down: dict[FFNSite, Tensor] = {}
        for sites in every:
            layers: list[RankedLayer] = []
            for site in sites:
                residual = ranked[site].residual
                assert residual is not None, "asked for by last=True"
                layers += [self._layer(site, "up", ranked[site].channels), self._layer(site, "down", residual)]
            masks = row_masks(self.pruner, layers)
            up |= dict(zip(sites, masks[0::2], strict=True))
            down |= dict(zip(sites, masks[1::2], strict=True))
        return up, down

    def _layer(self, site: FFNSite, role: str, importance: Tensor) -> RankedLayer:
        width = site.d_model if role == "up" else site.d_ff
        name = f"{site.name}.{getattr(site, role)}" if self.layerwise else site.name
        return RankedLayer(name, importance, width, partial(self._weight, site, role))

    def _weight(self, site: FFNSite, role: str) -> Tensor:
        with materialised(self.model, site):
            return getattr(weights_of(self.model, site), role).clone()


class IsolatedFFNPipeline(BasePipeline):
    """Every FFN for itself: its inputs are as important as they are large."""

    def chains(self, steps: Steps) -> Sequence[Steps]:
        """One chain per FFN."""
        return [[[site]] for step in steps for site in step]


class ChainedFFNPipeline(BasePipeline):
    """FFN after FFN: what one gives to the residual channels is how important they are to the next.

    Only what FFNs write is passed on; attention and the residual skip are left out.
    """

    def chains(self, steps: Steps) -> Sequence[Steps]:
        """One chain of all."""
        return [steps]
