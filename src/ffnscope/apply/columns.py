"""New down columns of FFNs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ffnscope.apply.edits import Edit, applied
from ffnscope.ffn.projection import down_columns
from ffnscope.types import FFNSite


def column_edit(model: nn.Module, site: FFNSite, channels: Tensor, columns: Tensor) -> Edit:
    """New down columns [d_model, k] of some channels [k], however the model stores them."""
    entry = down_columns(model, site, channels)
    return Edit(entry, columns if entry.axis == 1 else columns.T)


def columns_replaced(model: nn.Module, down: Mapping[FFNSite, Tensor]) -> AbstractContextManager[None]:
    """Within the block, the down projections of these FFNs are others, [d_model, d_ff] each (see `applied`)."""
    return applied(model, [column_edit(model, site, torch.arange(site.d_ff), new) for site, new in down.items()])
