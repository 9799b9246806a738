"""What cannot be selectors of a model, told before it is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.offload import check_values
from ffnscope.ffn.projection import check_resident, shape_of
from ffnscope.sparse.selector import Selector
from ffnscope.types import FFNSite


def check_selectors(model: nn.Module, selectors: Any) -> None:
    """Refuse what is no mapping of sites of the model to functions.

    Raises:
        UsageError: something else, none, or sites of another model.
        NotAvailableError: a predictor that looks ahead.
        ModelError: weights are offloaded.
    """
    if not isinstance(selectors, Mapping):
        raise UsageError(
            f"selectors must be a card, as read_card reads it, or {{site: function}}; got {type(selectors).__name__}."
        )
    items: Mapping[Any, Any] = selectors
    if not items:
        raise UsageError(
            "no selectors were given; expected one per FFN that is to be sparse, or a card with such an FFN."
        )
    for site, select in items.items():
        _check_kind(site, select)
        _check_site(model, site)


def _check_kind(site: Any, select: Any) -> None:
    """Python checks no types, and a card's file, names of modules and masks are near at hand."""
    if not isinstance(site, FFNSite):
        raise UsageError(
            f"selectors must be {{site: function}} with sites as find_sites gives them; got the key {site!r}."
        )
    if not callable(select):
        raise UsageError(
            f"the selector of {site.name} is a {type(select).__name__}; expected a function of x [T, d_model] that "
            "gives the mask [T, d_ff]."
        )
    if isinstance(select, Selector) and select.predictor.lookahead:
        raise NotAvailableError(
            f"the predictor of {site.name} looks ahead from the FFN one layer before; the runtime gives it the input "
            "of its own FFN. Use a predictor with lookahead 0."
        )


def _check_site(model: nn.Module, site: FFNSite) -> None:
    if shape_of(model, site) != (site.d_ff, site.d_model):
        raise UsageError(
            f"{site.name} has {site.d_ff} channels of width {site.d_model}; this model has "
            f"{shape_of(model, site)} there. Use the model that the selectors were made for."
        )
    check_values(model, site)
    check_resident(model, site)
