"""The command bench: what pruning saved, measured beside the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Overwrite, check_output
from ffnscope.cli.groups import grouped
from ffnscope.errors import UsageError
from ffnscope.evaluate.bench import bench
from ffnscope.evaluate.costs import Work
from ffnscope.evaluate.speed import BenchOptions
from ffnscope.io import SCHEMA, read_plan, write_json
from ffnscope.report.speed import print_speed
from ffnscope.run.outputs import versions
from ffnscope.run.progress import Reporter


@dataclass(frozen=True, slots=True)
class Measuring:
    """What is computed, and how often."""

    prompt_length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 256
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 32
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 1
    repeats: Annotated[int, typer.Option(help="Rounds that count; in each, both models run.")] = 10
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not.")] = 2
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the random prompt tokens.")] = 0
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each model in a process of its own.")] = True

    def options(self) -> BenchOptions:
        """Check the numbers; raises UsageError."""
        work = Work(self.batch_size, self.prompt_length, self.new_tokens)
        return BenchOptions(work, self.repeats, self.warmup, self.threads, self.seed, self.memory)


@grouped
def bench_command(
    *,
    dense: opt.Model,
    pruned: Annotated[str | None, typer.Argument(help="The pruned model; without it, --plan is applied.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan that it was pruned by; default: the one beside it.")] = None,
    measuring: Measuring,
    out: Annotated[Path | None, typer.Option(help="Also write .json.")] = None,
    loading: opt.Loading,
    overwrite: Overwrite = False,
) -> None:
    """Measure size, FLOPs, memory, prefill and decode of a dense and a pruned model side by side."""
    if pruned is None and plan is None:
        raise UsageError("give a second model (the pruned one), or --plan FILE to slice the first one by.")
    if out is not None:
        if out.suffix != ".json":
            raise UsageError(f"--out {out} must end in .json.")
        check_output(out, overwrite)
    options = measuring.options()
    given = None if plan is None else read_plan(plan)
    with Reporter().task("bench", "steps") as update:
        result = bench(loading.source(dense), pruned, plan=given, options=options, on_step=update)
    print_speed(result, OUT)
    if out is not None:
        write_json(out, {"kind": "bench", "schema": SCHEMA, "versions": versions(), **result.to_dict()})
