"""The command inspect: the FFNs of a model, layer by layer, and what is left whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from ffnscope.cli.channels import OUT
from ffnscope.cli.groups import grouped
from ffnscope.cli.options import Loading, Model
from ffnscope.ffn.projection import reuse
from ffnscope.ffn.sites import select_sites
from ffnscope.ffn.survey import LeftOut, Survey, nothing_found, survey
from ffnscope.run.progress import Reporter
from ffnscope.types import FFNSite

_SIZES = ("d_model", "d_ff", "activation")


@grouped
def inspect_command(
    *,
    model: Model,
    tracked: Annotated[list[str] | None, typer.Option("--tracked", help="Pattern of layers; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    loading: Loading,
) -> None:
    """Show the FFNs that were found in a model, and what is left whole and why."""
    loaded = loading.open(Reporter(), model).model
    found = survey(loaded)
    sites = list(found.sites) if tracked is None else select_sites(found.sites, tracked)
    if as_json:
        print(json.dumps(_as_json(found, sites), indent=2, allow_nan=False))  # noqa: T201
    else:
        _print(found, sites)
    if not found.sites:
        raise nothing_found(loaded, found)


def _as_json(found: Survey, sites: Sequence[FFNSite]) -> dict[str, Any]:
    return {**asdict(found), "sites": [{"name": s.name, **asdict(s)} for s in sites]}


def _print(found: Survey, sites: Sequence[FFNSite]) -> None:
    if sites:
        table = Table(*(Column(name, overflow="fold") for name in ("FFN", "gate, up", "down")), *_SIZES)
        for s in sites:
            down = s.down if s.norm is None else f"{s.norm}, {s.down}"
            table.add_row(_name(s), _producers(s), down, str(s.d_model), str(s.d_ff), s.activation)
        OUT.print(table)
    for title, rows in (("left whole", found.refused), ("helper networks, not pruned", found.helpers)):
        if rows:
            OUT.print(_left_out(title, rows))
    channels = sum(s.d_ff for s in sites)
    whole = f", {len(found.refused)} left whole" if found.refused else ""
    OUT.print(Text(f"{found.model_class}: {len(sites)} FFNs, {channels:,} channels{whole}"))


def _name(site: FFNSite) -> str:
    """Every module of one FFN, a line each, and that they are one."""
    more = [f"({reuse(site)})"] if site.n_uses > 1 else []
    return "\n".join((site.name, *site.twins, *more))


def _producers(site: FFNSite) -> str:
    more = f" + {len(site.adapters)} adapters" if site.adapters else ""
    if site.fused is not None:
        return f"{site.up} ({site.fused}){more}"
    return f"{site.up}{more}" if site.gate is None else f"{site.gate}, {site.up}{more}"


def _left_out(title: str, rows: Sequence[LeftOut]) -> Table:
    table = Table(Column(title, overflow="fold"), "why")
    for row in rows:
        table.add_row(row.path, row.reason)
    return table
