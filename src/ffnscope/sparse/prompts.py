"""Selections that are those of a prompt (GRIFFIN): give a wrapped model the prompt before it generates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.errors import UsageError
from ffnscope.sparse.monitor import Watched
from ffnscope.sparse.predictors.interface import Prompted
from ffnscope.sparse.runtime import Runtime
from ffnscope.types import FFNSite


def begin_prompt(model: Any, input_ids: Tensor, runtime: Runtime) -> None:
    """Let all that is generated from now on use the channels of a prompt, as a card of griffin says.

    The model runs on the prompt once more than ``generate`` itself does.

    Args:
        model: wrapped by such a card.
        input_ids: of one prompt [1, T], two tokens or more, without padding.
        runtime: what `wrap_` returned.

    Raises:
        UsageError: several prompts or one token, or a model that was wrapped by another selection.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise UsageError(
            f"input_ids must be of one prompt, [1, T] with T at least 2, since a selection is that of one; got "
            f"{tuple(input_ids.shape)}."
        )
    predictors = _prompted(runtime)
    if not predictors:
        raise UsageError("this model was wrapped by no selection of prompts; only cards of griffin take one.")
    found: dict[FFNSite, Tensor] = {}

    def note(site: FFNSite, name: str, x: Tensor) -> None:
        found[site] = x.detach().reshape(-1, x.shape[-1])

    with torch.no_grad(), channel_taps(model, list(predictors), None, None, SignalTap(note, ("x",))):
        model(input_ids=input_ids, use_cache=False)
    with torch.no_grad():
        for site, predictor in predictors.items():
            predictor.begin(found[site])


def _prompted(runtime: Runtime) -> dict[FFNSite, Prompted]:
    watched = {} if runtime.monitor is None else runtime.monitor.selectors
    rules = {site: one.selector.predictor for site, one in watched.items() if isinstance(one, Watched)}
    return {site: one for site, one in rules.items() if isinstance(one, Prompted)}
