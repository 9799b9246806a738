"""Down columns of FFNs, replaced for a while."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ffnscope.apply.edits import Edit, applied
from ffnscope.ffn.projection import down_columns
from ffnscope.types import FFNSite


def columns_replaced(model: nn.Module, down: Mapping[FFNSite, Tensor]) -> AbstractContextManager[None]:
    """Within the block, the down projections of these FFNs are others, [d_model, d_ff] each (see `applied`)."""
    edits: list[Edit] = []
    for site, value in down.items():
        entry = down_columns(model, site, torch.arange(site.d_ff))
        edits.append(Edit(entry, value if entry.axis == 1 else value.T))
    return applied(model, edits)
