"""Channels in the order of a metric, as rows."""

from __future__ import annotations

from typing import Any

import torch

from ffnscope.errors import UsageError
from ffnscope.report.summary import natural_sign
from ffnscope.types import Scores


def ranking(scores: Scores, top: int | None = None, *, lowest: bool = False) -> list[dict[str, Any]]:
    """List channels of all sites, the most important first (or last with ``lowest``).

    Args:
        scores: of one metric.
        top: number of rows; None = all.
        lowest: start with the least important channels.

    Returns:
        Rows of rank (1 = first), site, layer, channel, value (natural sign) and share: the fraction of the site's
        channels whose score is lower. Ties keep the order of sites and channels.
    """
    if top is not None and top < 1:
        raise UsageError(f"top must be at least 1 row; got {top}.")
    values = torch.cat([v.double() for v in scores.values.values()])
    order = torch.sort(values, descending=not lowest, stable=True).indices[:top].tolist()
    owner = [(site, channel) for site in scores.values for channel in range(site.d_ff)]
    ordered = {site: v.double().sort().values for site, v in scores.values.items()}
    sign = natural_sign(scores.metric)
    rows: list[dict[str, Any]] = []
    for rank, index in enumerate(order, start=1):
        site, channel = owner[index]
        value = values[index]
        below = int(torch.searchsorted(ordered[site], value, right=False))
        rows.append(
            {
                "rank": rank,
                "site": site.name,
                "layer": site.layer,
                "channel": channel,
                "value": float(value) * sign + 0.0,
                "share_below": below / site.d_ff,
            }
        )
    return rows
