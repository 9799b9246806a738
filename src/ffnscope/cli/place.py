"""The command place: which channels lie on the fast device when it cannot hold all, and how fast that is."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ffnscope.apply.folder import sweep
from ffnscope.calibrate.collect import weights_hash
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Out, Overwrite, check_output, tell_changes, working_folder
from ffnscope.cli.groups import grouped
from ffnscope.errors import UsageError
from ffnscope.ffn.load import MEMORY, LoadedModel
from ffnscope.report.placement_table import placement_grid, placement_rows, placement_sentences
from ffnscope.report.tables import print_grid
from ffnscope.run.machine import library_bytes
from ffnscope.run.placement_steps import Bandwidths, PlacementJob, PlannedPlacement
from ffnscope.run.progress import Reporter
from ffnscope.run.seconds import seconds_per_token
from ffnscope.run.sparse_estimate import placement_lines, placement_work, print_sparse_estimate
from ffnscope.run.switches import bounds_of
from ffnscope.sparse.card_files import read_card
from ffnscope.sparse.placement.plan import write_placement
from ffnscope.sparse.placement.selections import Selections, card_selections, relu_selections
from ffnscope.sparse.relu.thresholds import THRESHOLDS, read_thresholds

_UNITS = {
    "": 1,
    **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**i for i, k in enumerate("KMGT", 1)},
}


@dataclass(frozen=True, slots=True)
class MachineChoice:
    """The two devices; a token is decoded on both."""

    fast_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that the device of the hot channels reads; measured on CUDA.")
    ] = None
    slow_bandwidth: Annotated[float | None, typer.Option(help="GB/s that the CPU reads; measured without it.")] = None
    sync: Annotated[float, typer.Option(help="Microseconds more for an FFN that both devices compute.")] = 20.0
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode where the speed can be measured.")] = 32

    def bandwidths(self) -> Bandwidths:
        """Check the numbers; raises UsageError."""
        if self.new_tokens < 1:
            raise UsageError(f"--new-tokens must be at least 1; got {self.new_tokens}.")
        fast, slow = (None if one is None else one * 1e9 for one in (self.fast_bandwidth, self.slow_bandwidth))
        found = Bandwidths(fast, slow, self.sync / 1e6)
        found.check()
        return found


@grouped
def place_command(
    *,
    model: opt.Model,
    out: Out,
    budget: Annotated[str, typer.Option(help="Memory of the fast device for channels, such as 2GiB or 500MB.")],
    card: Annotated[
        Path | None, typer.Option(help="Card of the selection (sparsify makes it); without it a ReLU model's zeros.")
    ] = None,
    machine: MachineChoice,
    text: opt.TextChoice,
    loading: opt.Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Plan which FFN channels lie on the GPU when it cannot hold all: OUT, a JSON file for `split_`.

    Channels are counted as they are selected on the text, by a card or by the zeros of a ReLU model (with its
    thresholds.json, where relufy left one). Speeds are predicted, simulated on other documents, and, with a CUDA
    device, measured. An interrupted call goes on with its traces.
    """
    if out.suffix != ".json":
        raise UsageError(f"--out {out} must end in .json.")
    check_output(out, overwrite)
    size, bandwidths = _bytes(budget), machine.bandwidths()
    held = None if card is None else read_card(card)
    text.check_calibration()
    reporter = Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = _on_cpu(loading).open(reporter, model)
    if held is not None:
        selections: Selections = card_selections(loaded.model, held)
    else:
        selections = relu_selections(loaded.model, _thresholds(model))
    windows = text.calibration(loaded)
    facts = _facts(loaded, card, windows.source)
    job = PlacementJob(loaded, selections, windows, size, bandwidths, text.batch_size, machine.new_tokens, facts)
    job.check()
    if dry_run:
        sites = list(selections)
        lines = placement_lines(job, seconds_per_token(loaded.model, sites))
        print_sparse_estimate("place", lines, bounds_of(loaded, sites, placement_work(job), libraries), OUT)
        return
    with working_folder(out.with_name(f".{out.name}.place.part")) as part:
        sweep(out.parent, out.name)
        tell_changes(part, {"the model": facts["model"], "the calibration text": windows.hash}, reporter)
        found = job.plan(part, reporter)
        write_placement(out, found.placement)
    _print(found, as_json)
    reporter.say(f"saved {out}")


def _on_cpu(loading: opt.Loading) -> opt.Loading:
    """The model is loaded on the CPU; what goes to the fast device is what is planned here."""
    if loading.device not in ("auto", "cpu") or loading.device_map is not None or loading.stream is not None:
        raise UsageError(
            "place loads the model on the CPU and decides itself what goes to the GPU; leave out --device, "
            "--device-map and --stream."
        )
    return replace(loading, device="cpu")


def _thresholds(model: str) -> Any:
    """Thresholds beside the weights of a ReLU model; None where there are none."""
    path = Path(model) / THRESHOLDS
    return read_thresholds(path) if path.is_file() else None


def _facts(loaded: LoadedModel, card: Path | None, source: str) -> dict[str, Any]:
    chosen = "exact zeros" if card is None else f"card {card.name}"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in loaded.model.parameters()})
    return {
        "model": weights_hash(loaded.model),
        **loaded.facts,
        "selection": chosen,
        "text": source,
        "bytes_of": f"weights as loaded ({', '.join(dtypes)})",
    }


def _bytes(text: str) -> int:
    found = re.fullmatch(MEMORY, text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"--budget {text!r} is no size: expected bytes, or text such as 2GiB or 500MB.")
    unit = found[2] or ""
    return int(float(text.strip()[: len(text.strip()) - len(unit)]) * _UNITS[unit.upper()])


def _print(found: PlannedPlacement, as_json: bool) -> None:
    placement = found.placement
    if as_json:
        speeds = [placement.all_slow, placement.predicted, *found.speeds]
        value = {"facts": placement.facts, "machine": asdict(placement.machine), "budget": placement.budget}
        value |= {"bytes": placement.bytes, "all_slow": asdict(speeds[0]), "speeds": [asdict(s) for s in speeds[1:]]}
        value |= {"sites": placement_rows(placement, found.hits)}
        print(json.dumps(value, indent=2, allow_nan=False))  # noqa: T201
        return
    print_grid(placement_grid(placement, found.hits), OUT)
    for sentence in placement_sentences(placement, found.speeds, found.why_not):
        OUT.print(Text(sentence))
