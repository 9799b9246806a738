"""``ffnscope run --dry-run``: what stops the run is found, cheapest first, and what it would take is printed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ffnscope.errors import ConfigError, FFNScopeError
from ffnscope.ffn.load import quiet_transformers
from ffnscope.run.choices import background_hash, reference_bytes
from ffnscope.run.estimate import estimate, print_estimate
from ffnscope.run.folder import check_folder
from ffnscope.run.lines import duration
from ffnscope.run.machine import library_bytes
from ffnscope.run.outputs import check_plots
from ffnscope.run.progress import Reporter
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep import check_sweep
from ffnscope.run.sweep_cells import SweepConfig
from ffnscope.run.sweep_record import SweepRecord
from ffnscope.run.switches import FILE, Bounds
from ffnscope.run.windows import check_texts


def dry_run(config: RunConfig, console: Console, *, overwrite: bool = False) -> None:
    """Print what a run would do; compute and write nothing.

    Raises:
        The errors of `ffnscope.run.run` that need no computing: the folder, a text, the background, a model, the
        reference model.
    """
    check_plots(config)
    check_folder(config, overwrite=overwrite)
    check_texts(config)
    _ = background_hash(config)  # refuses a file that is missing or damaged
    reference = reference_bytes(config)
    print_estimate(config, console, overwrite=overwrite)
    if reference:
        what = f"{reference / 2**30:.1f} GiB more beside the model, while it is checked and while scores are made"
        console.print(Text(f"the reference model {config.model.reference_id} takes {what}"))


def dry_run_sweep(sweep: SweepConfig, console: Console, *, overwrite: bool = False) -> None:
    """Print every cell with about how long it would take and its peak memory; compute and write nothing.

    Of cells that do not fit, the peaks of their stages and the options that would make them fit are told as for a
    single run, cells of which the same is true together; where all fit, of the largest.

    Raises:
        ConfigError, UsageError, ArtifactError: as `run_sweep`; also for cells that could not be run, for example with
            a model that is missing, told after the others.
    """
    check_sweep(sweep, overwrite=overwrite)
    record = SweepRecord(sweep)
    todo = {cell.name for cell in record.unfinished()}
    table = Table(
        "cell", "state", "about", "peak memory", title=Text(f"{sweep.name}: nothing was computed (--dry-run)")
    )
    failed: dict[str, str] = {}
    bounds: dict[str, Bounds] = {}
    total, libraries = 0.0, library_bytes()  # before the models of earlier cells
    with Reporter().task("estimate", "cells") as update, quiet_transformers():
        for i, cell in enumerate(sweep.cells, 1):
            try:
                found = estimate(cell.config, overwrite=overwrite, libraries=libraries)
            except FFNScopeError as error:
                failed[cell.name] = str(error)
                table.add_row(Text(cell.name), "cannot run", "", "")
                continue
            finally:
                update(i, len(sweep.cells))
            new = cell.name in todo
            total += found.seconds if new else 0.0
            bounds[cell.name] = found.bounds
            about, peak = duration(found.seconds), f"{found.peak_bytes / 2**30:.2f} GiB"
            table.add_row(Text(cell.name), record.state(cell) if new else "finished", about, peak)
    console.print(table)
    told = f"{len(todo)} of {len(sweep.cells)} cells to run ({sweep.asked.engine}), together about {duration(total)}"
    console.print(Text(f"{told}; output in {sweep.folder}"))
    _print_at_once(sweep, {name: one for name, one in bounds.items() if name in todo}, console)
    _print_bounds(bounds, console)
    if failed:
        raise ConfigError(f"sweep {sweep.name}", [f"cell {name}: {why}" for name, why in failed.items()])


def _print_at_once(sweep: SweepConfig, bounds: Mapping[str, Bounds], console: Console) -> None:
    """Print what cells that run at the same time take, if they share a machine or a device."""
    n = min(len(bounds), 1 if sweep.asked.engine == "sequential" else sweep.asked.workers or len(bounds))
    if n > 1:
        peaks = sorted((one.need.device for one in bounds.values()), reverse=True)
        taken = f"{sum(peaks[:n]) / 2**30:.2f} GiB together where they share a machine or a device"
        console.print(Text(f"up to {n} cells at the same time, {taken} (sweep.workers)"))


def _print_bounds(bounds: Mapping[str, Bounds], console: Console) -> None:
    """Print what cells that do not fit would need; cells of which the same is told are told together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, one in bounds.items():
        if not one.fits:
            groups.setdefault(tuple(one.told(FILE)), []).append(name)
    if bounds and not groups:
        name = max(bounds, key=lambda name: bounds[name].need.device)
        groups[tuple(bounds[name].told(FILE))] = [f"{name} (the largest)"]
    for lines, names in groups.items():
        console.print(Text(f"{', '.join(names)}:"))
        for line in lines:
            console.print(Text(f"  {line}"))
