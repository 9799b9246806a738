"""Scorers of your own as metrics, so that the command line, YAML files and comparisons know them by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.graph import DecoderGraph
from ffnscope.metrics.scorers import BaseScorer
from ffnscope.metrics.views import CHANNEL_CHAIN_NEEDS, CHANNEL_NEEDS, ChannelView, chained_scores
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNSite

S = TypeVar("S", bound=BaseScorer)


def scorer(name: str, *, source: str = "") -> Callable[[type[S]], type[S]]:
    """Register a scorer class as two metrics: ``name`` (every FFN for itself) and ``name_chained`` (FFN after FFN).

    They give what `IsolatedFFNPipeline` and `ChainedFFNPipeline` give in the default mode. The arguments of the class,
    but ``device``, are the parameters of both, and its docstring is their description.

    Args:
        name: of the metric.
        source: paper or place that it is from.

    Raises:
        UsageError: a name is taken, or the class has ``*args`` or ``**kwargs``.
    """

    def add(cls: type[S]) -> type[S]:
        for label, needs, isolated in (
            (name, CHANNEL_NEEDS, True),
            (f"{name}_chained", CHANNEL_CHAIN_NEEDS, False),
        ):
            metric(label, needs=needs, source=source, scope="model", check=cls)(_scores_by(cls, isolated))
        return cls

    return add


def _scores_by(cls: type[BaseScorer], isolated: bool) -> Callable[..., dict[FFNSite, Tensor]]:
    @functools.wraps(cls.__init__)  # its module has the names of the types of the parameters
    def score(graph: DecoderGraph, stats: Mapping[FFNSite, ChannelStats], **params: Any) -> dict[FFNSite, Tensor]:
        one = cls(**params)
        one.begin()
        return chained_scores(one, graph, stats, ChannelView, isolated=isolated)

    given = inspect.Parameter.POSITIONAL_OR_KEYWORD
    inputs = [inspect.Parameter(name, given) for name in ("graph", "stats")]
    score.__signature__ = inspect.Signature([*inputs, *_parameters(cls)])  # pyright: ignore[reportAttributeAccessIssue]
    score.__doc__, score.__module__ = inspect.getdoc(cls), cls.__module__
    return score


def _parameters(cls: type[BaseScorer]) -> list[inspect.Parameter]:
    found = [p for p in inspect.signature(cls).parameters.values() if p.name != "device"]
    for one in found:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            raise UsageError(
                f"{cls.__name__}.__init__ takes {one}; name its arguments, which are the parameters of the metric."
            )
    return [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in found]
