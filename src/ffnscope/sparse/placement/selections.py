"""What a plan starts from: a selection for every FFN of a model, and what a token reads beside the channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.evaluate.costs import step_bytes
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.placement.machine import Machine
from ffnscope.sparse.placement.plan import channel_bytes
from ffnscope.sparse.relu.thresholds import NonZero
from ffnscope.sparse.selector import AllChannels, Selector
from ffnscope.types import FFNSite

Select = Callable[[Tensor], Tensor]
Selections = Mapping[FFNSite, Select]


def card_selections(model: nn.Module, card: SparsityCard) -> dict[FFNSite, Select]:
    """The selections of a card, and all channels of FFNs that it leaves dense.

    Raises:
        ArtifactError: the card is of another model.
        NotAvailableError: its predictors read something else than the token in the FFN, by which channels are counted.
    """
    rule = card.rule
    if rule.lookahead or rule.prompt:
        why = "look ahead from the FFN one layer before" if rule.lookahead else "take their scores from a prompt"
        raise NotAvailableError(
            "a placement counts channels token by token from the input of each FFN, and the predictors of this card "
            f"({rule.predictor}) {why}. Give a card whose predictor reads the token, such as low_bit."
        )
    chosen = card.selectors(model)
    return {site: chosen.get(site) or AllChannels(site.d_ff) for site in find_sites(model)}


def relu_selections(model: nn.Module, thresholds: Mapping[FFNSite, float] | None = None) -> dict[FFNSite, Select]:
    """The channels that a ReLU does not make zero, or a FATReLU with these thresholds.

    Raises:
        UsageError: another activation, or thresholds of other FFNs.
    """
    sites = find_sites(model)
    other = next((site for site in sites if site.activation not in ("relu", "relu2")), None)
    if other is not None:
        raise UsageError(
            f"{other.name} has the activation {other.activation}, which makes no channel exactly zero. Give the card "
            "of a calibrated selection (sparsify makes one), or a ReLU model (relufy makes one)."
        )
    if thresholds is not None and set(thresholds) != set(sites):
        raise UsageError("the thresholds are of other FFNs than this model has; give those that were made with it.")
    return {site: NonZero(model, site, 0.0 if thresholds is None else thresholds[site]) for site in sites}


def selection_bytes(selections: Selections) -> int:
    """Bytes per token that selecting reads, as they are loaded: predictors, or the matrix that a ReLU sees."""
    found = 0
    for one in selections.values():
        if isinstance(one, Selector):
            found += one.predictor.bytes_read
        elif isinstance(one, NonZero):
            found += one.ffn.matrix_bytes("up" if one.ffn.weights.gate is None else "gate")
    return found


def machine_for(model: nn.Module, selections: Selections, fast: float, slow: float, sync_seconds: float) -> Machine:
    """The machine on which a token takes what is not FFN from the fast device, and selects channels on the slow one.

    Args:
        model: whose weights are counted as they are loaded.
        selections: of its FFNs.
        fast: bytes per second.
        slow: bytes per second.
        sync_seconds: see `Machine`.
    """
    ffns = sum(site.d_ff * channel_bytes(model, site) for site in selections)
    rest = max(0, step_bytes(model) - ffns)
    return Machine(fast, slow, sync_seconds, rest / fast + selection_bytes(selections) / slow)
