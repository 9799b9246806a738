"""The commands run, metrics, plan show and plan diff; and how errors end the process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ffnscope import __version__
from ffnscope.calibrate.parallel import n_processes, shared_windows
from ffnscope.cli.answer import answer_command
from ffnscope.cli.bench import bench_command
from ffnscope.cli.channels import OUT, eval_command
from ffnscope.cli.curves import curves_command
from ffnscope.cli.files import Overwrite
from ffnscope.cli.inspect import inspect_command
from ffnscope.cli.place import place_command
from ffnscope.cli.predictors import predictors_app
from ffnscope.cli.prune import prune_command
from ffnscope.cli.rank import rank_command
from ffnscope.cli.relufy import relufy_command
from ffnscope.cli.report import compare_command, report_command
from ffnscope.cli.score import score_command
from ffnscope.cli.sparsify import sparsify_command
from ffnscope.errors import FFNScopeError, UsageError
from ffnscope.io import read_plan
from ffnscope.plan.build import diff_plans
from ffnscope.registry import METRICS, cost_of, import_own
from ffnscope.types import PruningPlan

if TYPE_CHECKING:
    from ffnscope.run import SweepConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
plan_app = typer.Typer(no_args_is_help=True, help="Look at pruning plans.")
app.add_typer(plan_app, name="plan")
app.add_typer(predictors_app, name="predictors")
app.command("score")(score_command)
app.command("rank")(rank_command)
app.command("prune")(prune_command)
app.command("curves")(curves_command)
app.command("eval")(eval_command)
app.command("sparsify")(sparsify_command)
app.command("answer")(answer_command)
app.command("relufy")(relufy_command)
app.command("place")(place_command)
app.command("bench")(bench_command)
app.command("inspect")(inspect_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line; an error ends it with one message and status 1 or 2, Ctrl-C with 130."""
    try:
        status = _call()
        sys.stdout.flush()
    except OSError as error:  # what is printed cannot be written, or a file of which no command knows more
        _say(f"error: {error}.")
        _drop_output()
        status = 1
    sys.exit(status)


def _call() -> int | str | None:
    """Run the command and return its status."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            with shared_windows() as leads:
                if leads:
                    if n_processes() > 1:
                        _say(f"{n_processes()} processes share the windows of every pass.", "dim")
                    app()
    except FFNScopeError as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except SystemExit as end:
        if end.code == INTERRUPTED:
            going_on = "`run`, `score`, `prune`, `curves`, `sparsify`, `answer`, `relufy`, `place`, "
            going_on += "`rank --validate` and `eval --out`"
            _say(f"interrupted. Called again, {going_on} go on where they stopped.")
        return end.code
    return 0


def _drop_output() -> None:
    """Let nothing be written at the end of the process either, where it would fail with a traceback."""
    with contextlib.suppress(OSError), Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Which FFN channels of a language model carry the loss, and how to remove the others."""
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value; repeatable.")] = None,
    only_estimate: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Analyse, prune and evaluate a model as a YAML file says; an interrupted run continues.

    With a `sweep` block: several runs, each in a folder of its own, and one report.
    """
    from ffnscope.report.tables import print_results
    from ffnscope.run import RunConfig, run
    from ffnscope.run.dry_run import dry_run
    from ffnscope.run.sweep_cells import load_any

    loaded = load_any(config, overrides or ())
    if not isinstance(loaded, RunConfig):
        _run_sweep(loaded, only_estimate=only_estimate, overwrite=overwrite)
        return
    if only_estimate:
        dry_run(loaded, OUT, overwrite=overwrite)
        return
    result = run(loaded, overwrite=overwrite)
    if result.rows:
        print_results(result.rows, OUT)


def _run_sweep(sweep: SweepConfig, *, only_estimate: bool, overwrite: bool) -> None:
    from ffnscope.report.sweep_page import sweep_grids
    from ffnscope.report.tables import print_grid
    from ffnscope.run.dry_run import dry_run_sweep
    from ffnscope.run.sweep import run_sweep

    if only_estimate:
        dry_run_sweep(sweep, OUT, overwrite=overwrite)
        return
    result = run_sweep(sweep, overwrite=overwrite)
    for grid in sweep_grids(result.cells):
        print_grid(grid, OUT)
    result.check()


@app.command("metrics")
def metrics_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    module: Annotated[list[str] | None, typer.Option(help="Import this module, which registers metrics.")] = None,
) -> None:
    """List the metrics: what they need and cost, their natural sign, parameters and source."""
    for name in module or ():
        import_own(name)
    rows = [_metric_row(name) for name in METRICS.names()]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        params = "".join(f" {k}={v}" for k, v in row["parameters"].items())
        sign = "high = keep" if row["natural_sign"] > 0 else "low = keep"
        needs = ", ".join(row["needs"]) or "weights only"
        OUT.print(Text.assemble((row["name"], "bold"), (params, "cyan")))
        OUT.print(Text(f"    {row['summary']}"))
        OUT.print(
            Text(
                f"    scope {row['scope']}; cost {row['cost']}; {sign}; needs {needs}; source {row['source']}",
                style="dim",
            )
        )


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(help="Plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a plan: widths per site, and where it came from."""
    plan = read_plan(file)
    rows = [_plan_row(plan, site) for site in plan.kept]
    if as_json:
        _print_json({"metric": plan.metric, "allocator": plan.allocator, "sparsity": plan.sparsity, "sites": rows})
        return
    table = Table("site", "d_ff", "kept", "sparsity", "protected")
    for row in rows:
        table.add_row(row["site"], str(row["d_ff"]), str(row["width"]), f"{row['sparsity']:.1%}", str(row["protected"]))
    OUT.print(table)
    asked = f"metric {plan.metric}, allocator {plan.allocator}, asked {plan.budget.sparsity:g}"
    OUT.print(Text(f"{asked}, got {plan.sparsity:.4f}"))


@plan_app.command("diff")
def plan_diff(
    first: Annotated[Path, typer.Argument(help="Plan file.")],
    second: Annotated[Path, typer.Argument(help="Plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two plans site by site."""
    rows = diff_plans(read_plan(first), read_plan(second))
    if as_json:
        _print_json(rows)
        return
    table = Table("site", "width a", "width b", "only a", "only b", "Jaccard")
    for row in rows:
        numbers = (row["width_a"], row["width_b"], row["only_a"], row["only_b"])
        table.add_row(row["site"], *map(str, numbers), f"{row['jaccard']:.3f}")
    OUT.print(table)


def _say(text: str, style: str = "red") -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _warn(message: Warning | str, *_: Any) -> None:
    """Show a warning by its text, without the line of code that it came from."""
    _say(f"warning: {message}", "yellow")


def _plan_row(plan: PruningPlan, site: Any) -> dict[str, Any]:
    width = plan.widths[site]
    protected = plan.protected[site].numel() if site in plan.protected else 0
    return {
        "site": site.name,
        "d_ff": site.d_ff,
        "width": width,
        "sparsity": 1 - width / site.d_ff,
        "protected": protected,
    }


def _metric_row(name: str) -> dict[str, Any]:
    rule = METRICS.get(name)
    return {
        "name": name,
        "family": rule.family,
        "summary": rule.summary,
        "scope": rule.scope,
        "cost": cost_of(rule),
        "needs": list(rule.needed({})),
        "natural_sign": rule.natural_sign,
        "parameters": {k: p.default for k, p in rule.params.items()},
        "source": rule.source,
    }


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))  # noqa: T201
