"""A plan for two devices in words, a table, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffnscope.report.tables import Cell, Grid
from ffnscope.sparse.placement.plan import Placement, Speed
from ffnscope.types import FFNSite

MIB = 2**20


def placement_sentences(placement: Placement, speeds: Sequence[Speed], why_not: Mapping[str, str]) -> list[str]:
    """What is placed where, for which machine, and how fast that is; each speed says how it is known."""
    n_hot, n = _counts(placement)
    machine = placement.machine
    used, budget, sync, rest = placement.bytes, placement.budget, machine.sync_seconds, machine.other_seconds
    told = [
        f"{n_hot:,} of {n:,} channels are hot: {used / MIB:,.2f} MiB of {budget / MIB:,.2f} MiB, in the dtypes that "
        "are loaded.",
        f"Machine: {machine.fast / 1e9:,.3g} GB/s fast, {machine.slow / 1e9:,.3g} GB/s slow, {sync * 1e6:,.3g} µs "
        f"where an FFN needs both, {rest * 1e3:,.3g} ms per token for selecting and for all that is not FFN.",
        f"All channels on the slow device: {placement.all_slow.tokens_per_second:,.4g} tokens/s (predicted).",
    ]
    for one in (placement.predicted, *speeds):
        told.append(f"This plan: {one.tokens_per_second:,.4g} tokens/s ({one.kind}{_tokens(one)}).")
    return [*told, *(f"Not {name}: {reason}" for name, reason in why_not.items())]


def placement_grid(placement: Placement, hits: Mapping[FFNSite, float]) -> Grid:
    """Hot channels and bytes on both devices, FFN by FFN."""
    columns = ["FFN", "hot channels", "of", "selected channels that are hot", "MiB fast", "MiB slow"]
    lines: list[list[Cell]] = []
    for row in placement_rows(placement, hits):
        sizes = (row["bytes_fast"] / MIB, row["bytes_slow"] / MIB)
        texts = (row["site"], f"{row['hot']:,}", f"{row['d_ff']:,}", f"{row['hit']:.1%}", *(f"{x:,.2f}" for x in sizes))
        lines.append([Cell(text) for text in texts])
    notes = ["Bytes are those of the weights as they are loaded, without biases and predictors."]
    return Grid("Hot channels", columns, lines, notes)


def placement_rows(placement: Placement, hits: Mapping[FFNSite, float]) -> list[dict[str, Any]]:
    """One flat row per FFN."""
    found: list[dict[str, Any]] = []
    for site, index in placement.hot.items():
        n_hot, size = index.numel(), placement.channel_bytes[site]
        row = {"site": site.name, "layer": site.layer, "hot": n_hot, "d_ff": site.d_ff, "hit": hits[site]}
        found.append({**row, "bytes_fast": n_hot * size, "bytes_slow": (site.d_ff - n_hot) * size})
    return found


def _counts(placement: Placement) -> tuple[int, int]:
    return sum(index.numel() for index in placement.hot.values()), sum(site.d_ff for site in placement.hot)


def _tokens(speed: Speed) -> str:
    return f", {speed.n_tokens:,} tokens" if speed.n_tokens else ""
