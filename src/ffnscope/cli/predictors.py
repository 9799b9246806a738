"""The commands predictors list and predictors export: what scores channels, and trained matrices for other programs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ffnscope.apply.folder import sweep
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import working_folder
from ffnscope.cli.groups import grouped
from ffnscope.errors import UsageError
from ffnscope.registry import POLICIES, PREDICTORS, Registry
from ffnscope.run.progress import Reporter
from ffnscope.sparse.card_files import read_card
from ffnscope.sparse.predictors.fc_files import check_new, write_fc_predictors
from ffnscope.sparse.predictors.low_rank import LowRank
from ffnscope.sparse.rivals import RIVALS, USUAL
from ffnscope.sparse.rule import DEFAULTS
from ffnscope.sparse.site_params import check_layers, ffn_norms

predictors_app = typer.Typer(no_args_is_help=True, help="What scores the channels of a token, and trained predictors.")
INTERNAL = {"static": ("kept",), "fc_files": ("layer", "norm"), "channel_threshold": ("gain",)}
"""Parameters that a card finds itself."""


@predictors_app.command("list")
def predictors_list() -> None:
    """List predictors and policies, with their parameters and sources, and what a curve may set beside them."""
    _print(PREDICTORS)
    _print(POLICIES)
    OUT.print(Text("row of a curve (--against ROW, contextual.against)", style="bold underline"))
    for label in RIVALS:
        OUT.print(Text(label + (" *" if label in USUAL else "")))
    OUT.print(Text("    * without --against"))


def _print(registry: Registry[Any]) -> None:
    OUT.print(Text(f"{registry.kind} (--{registry.kind}, --{registry.kind}-param NAME=VALUE)", style="bold underline"))
    for name in registry.names():
        item = registry.get(name)
        hidden = INTERNAL.get(name, ())
        values = {k: p.default for k, p in item.params.items() if k not in hidden}
        values |= {**DEFAULTS.get(name, {}), **_WORDS.get(name, {})}
        params = "".join(f" {k}" if v is inspect.Parameter.empty else f" {k}={v}" for k, v in values.items())
        OUT.print(Text.assemble((name, "bold"), (_HYBRID if name == "hybrid" else params, "cyan")))
        OUT.print(Text(f"    {item.summary}" + (f" Source: {item.source}" if item.source else "")))


_DENSITY = "that of the target, or 0.3"
_WORDS = {"low_rank": {"density": _DENSITY}, "deja_vu": {"density": _DENSITY, "loss": "published"}}
"""Defaults that are not those of the signature."""
_HYBRID = " core=0.02 rest=nucleus, and parameters of rest; core may be the file of a plan"


@predictors_app.command("export")
@grouped
def predictors_export(
    *,
    model: opt.Model,
    card: Annotated[Path, typer.Option(help="Card of trained low-rank predictors, as sparsify makes it.")],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder.")],
    before_norm: Annotated[
        bool, typer.Option(help="For what is before the norm of each FFN, as PowerInfer reads; else the FFN's input.")
    ] = True,
    loading: opt.Loading,
) -> None:
    """Write the predictors of a card as PowerInfer and ProSparse read them: OUT/model_LAYER.pt with fc1 and fc2.

    `sparsify --predictor fc_files --predictor-param folder=OUT` reads such files back, and calibrates a policy to them.
    """
    check_new(out)
    found = read_card(card)
    if not found.rule.trained:
        raise UsageError(
            f"{card} has predictors {found.rule.predictor!r}; only trained ones can be exported. Make a card by "
            "`sparsify --predictor low_rank`."
        )
    sites = [one.site for one in found.sites]
    check_layers(sites)
    loaded = loading.open(Reporter(), model).model
    found.check_model(loaded)
    made: list[LowRank] = []
    for one in found.sites:
        known = found.restored(loaded, one)
        if known is None or not isinstance(known[0], LowRank):
            raise UsageError(f"{card} holds no predictor of {one.site.name}; make the card again by this version.")
        made.append(known[0])
    norms = [*ffn_norms(loaded, sites).values()] if before_norm else None
    with working_folder(out.with_name(f".{out.name}.export.part")):
        sweep(out.parent, out.name)
        write_fc_predictors(out, made, norms)
    read = "what is before the norm of each FFN" if before_norm else "the input of each FFN"
    OUT.print(Text(f"{len(made)} predictors of {read} in {out}"))
