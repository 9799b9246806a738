"""Memory of each stage, from the shapes of a model: loaded as a whole, or streamed block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ffnscope.analyze.measured import CurveRounds
from ffnscope.apply.ffn_tokens import token_bytes
from ffnscope.calibrate.blocks import list_of_blocks
from ffnscope.calibrate.forward import input_device
from ffnscope.calibrate.steps import Step
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.streamed import Place
from ffnscope.types import FFNSite

_LOGITS = 12  # bytes: in the model's dtype, in float32, and their gradient
_SHARED = ("calibrate", "evaluate")
_SLICE = (2**22, 512)  # logits and tokens that the head of a streamed model is run on; 16 times the logits on a GPU


@dataclass(frozen=True, slots=True)
class Shapes:
    """Numbers of values in a model, whatever their dtype.

    Attributes:
        weights: all.
        block: the largest decoder block; 0 where the model is no list of blocks, and cannot be streamed.
        blocks: number of them.
        outside: beside the blocks: embeddings and head.
        d_model: width of the hidden states.
        saved: kept per token for a backward through all FFNs and what is beside them.
        vocabulary: logits per token.
        accelerator: whether it computes on another device than the CPU.
    """

    weights: int
    block: int
    blocks: int
    outside: int
    d_model: int
    saved: int
    vocabulary: int
    accelerator: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of a text, of which at most ``batch`` windows of ``length`` run at a time."""

    tokens: int = 0
    length: int = 0
    batch: int = 1

    def at_once(self, batch: int | None) -> int:
        """Tokens of a batch, where it has at most so many windows."""
        return min(self.tokens, self.length * (self.batch if batch is None else min(batch, self.batch)))


@dataclass(frozen=True, slots=True)
class Workload:
    """What the stages of a command run on.

    Attributes:
        forward: text of the calibration.
        backward: share of it that also runs backward.
        held_out: text of the evaluation.
        sums: bytes of the statistics.
        refit_states: values of hidden states that a sequential reconstruction keeps; 0 = there is none.
        refit: bytes that it takes beside them.
        contextual: bytes that contextual sparsity takes beside the weights, which must all be in memory; 0 = it is not
            asked for.
        more: bytes that stay beside the model all the time, for example a reference model.
        reloads: whether it is loaded once more into main memory to be cut and saved; one that is streamed is not.
        curves: text on which curves are measured.
        columns: bytes of the statistics and fitted columns that this takes beside logits and hidden states.
        tasks: requests of downstream tasks, in batches of their own.
        only: stages that there are; empty = all that have something to do.
    """

    forward: Load = Load()
    backward: Load = Load()
    held_out: Load = Load()
    sums: int = 0
    refit_states: int = 0
    refit: int = 0
    contextual: int = 0
    more: int = 0
    reloads: bool = False
    curves: Load = Load()
    columns: int = 0
    tasks: Load = Load()
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is loaded and run.

    Attributes:
        item: bytes per weight.
        stream: place of waiting hidden states of a streamed model; None = its weights are in memory.
        batch: windows at a time at most; None = as asked.
        elsewhere: weights that a device_map leaves outside of the device that computes.
        beside: those of them that are in main memory; the others are on disk.
    """

    item: int
    stream: Place | None = None
    batch: int | None = None
    elsewhere: int = 0
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Processes:
    """How many processes share the windows: in all, on this machine, and on the device of the first one."""

    everywhere: int = 1
    here: int = 1
    on_device: int = 1

    def share(self, load: Load) -> Load:
        """What one of them runs of a text."""
        return replace(load, tokens=-(-load.tokens // self.everywhere))


ALONE = Processes()


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a stage takes: on the device that computes, in main memory beside that, and on disk for the time being."""

    device: int
    host: int = 0
    disk: int = 0


def shapes_of(model: Any, sites: Sequence[FFNSite]) -> Shapes:
    """Count the values of a model, which may be on the meta device."""
    weights = sum(p.numel() for p in model.parameters())
    try:
        modules = list_of_blocks(model, [site for site in sites if site.role == "ffn"])[1]
    except NotAvailableError:
        modules = ()
    blocks = [sum(p.numel() for p in module.parameters()) for module in modules]
    return Shapes(
        weights,
        max(blocks, default=0),
        len(blocks),
        max(0, weights - sum(blocks)),
        max(s.d_model for s in sites),
        sum(4 * s.d_ff + 12 * s.d_model for s in sites),
        model.get_input_embeddings().weight.shape[0],
        input_device(model).type != "cpu",
    )


def setting_of(loaded: LoadedModel) -> Setting:
    """How a model is asked for; its dtype is that of its first weight."""
    model: Any = loaded.model
    item, places = next(iter(model.parameters())).element_size(), getattr(model, "hf_device_map", None) or {}
    if loaded.source.device_map is None or "meta" not in {p.device.type for p in model.parameters()}:
        return Setting(item, loaded.source.stream)  # of what is loaded to estimate, the weights may be missing
    away = {name: p.numel() for name, p in model.named_parameters() if p.device.type == "meta"}
    on_disk = sum(size for name, size in away.items() if _placed(name, places) == "disk")
    return Setting(item, elsewhere=sum(away.values()), beside=sum(away.values()) - on_disk)


def _placed(name: str, places: Mapping[str, Any]) -> Any:
    """Where a device_map puts a parameter: by the longest of its names that the parameter begins with."""
    found = max((key for key in places if not key or f"{name}.".startswith(f"{key}.")), key=len, default=None)
    return None if found is None else places[found]


def load_of_steps(steps: Sequence[Step], *, backward: bool) -> Load:
    """Text of the steps of a pass, or of those that run backward: of several passes, give the steps of one."""
    batches = [step.batch for step in steps if step.backward or not backward]
    return Load(
        sum(b.input_ids.numel() for b in batches),
        max((b.length for b in batches), default=0),
        max((len(b) for b in batches), default=1),
    )


def load_of_text(windows: Sequence[Windows], batch: int) -> Load:
    """The largest of some texts in batches of so many windows."""
    largest = max(windows, key=lambda w: w.input_ids.numel(), default=None)
    return Load() if largest is None else Load(largest.input_ids.numel(), largest.length, batch)


def stage_bytes(shapes: Shapes, work: Workload, setting: Setting) -> dict[str, Bytes]:
    """Peak of every kind of stage, without the libraries.

    They are "calibrate", "score", "curves", "reconstruct", "evaluate", "contextual" and "save".

    Stages of which the work has nothing are left out, but scoring and saving.
    """
    found = _streamed(shapes, work, setting) if setting.stream else _resident(shapes, work, setting)
    evaluated = work.held_out.tokens + work.tasks.tokens
    given = {"calibrate": work.forward.tokens, "reconstruct": work.refit_states, "evaluate": evaluated}
    given |= {"contextual": work.contextual, "curves": work.curves.tokens}
    wanted = set(work.only or found)
    return {stage: size for stage, size in found.items() if given.get(stage, 1) and stage in wanted}


def _resident(shapes: Shapes, work: Workload, setting: Setting) -> dict[str, Bytes]:
    item, logits = setting.item, _LOGITS * shapes.vocabulary
    away = max(0, setting.elsewhere - shapes.block) * item  # one block at a time is brought
    base, beside = shapes.weights * item - away + work.more, setting.beside * item
    calibrate = max(
        work.forward.at_once(setting.batch) * logits,
        work.backward.at_once(setting.batch) * (shapes.saved * item + logits),
    )
    copy = shapes.weights * item * work.reloads
    pair = 2 * item * shapes.vocabulary  # dense and pruned logits; of tasks, logits and their logarithms
    cut = pair + shapes.d_model * item * max(1, shapes.blocks)  # what every block is given waits
    evaluate = max(work.held_out.at_once(setting.batch), work.tasks.at_once(None)) * pair
    return {
        "calibrate": Bytes(base + calibrate + work.sums, beside),
        "score": Bytes(base + work.sums, beside),
        "reconstruct": Bytes(base + work.refit_states * item + work.refit, beside),
        "curves": Bytes(base + work.curves.at_once(setting.batch) * cut + work.columns, beside),
        "evaluate": Bytes(base + evaluate, beside),
        "contextual": Bytes(base + work.contextual + work.forward.at_once(setting.batch) * logits),
        "save": Bytes(base, beside + copy) if shapes.accelerator else Bytes(base + copy),
    }


def _streamed(shapes: Shapes, work: Workload, setting: Setting) -> dict[str, Bytes]:
    item, width = setting.item, shapes.d_model * setting.item
    block, outside = shapes.block * item, shapes.outside * item
    values, tokens = _SLICE[0] * (16 if shapes.accelerator else 1), _SLICE[1]
    head = outside + max(1, min(values // shapes.vocabulary, tokens)) * shapes.vocabulary * _LOGITS
    graph = shapes.saved * item // shapes.blocks
    per_batch = [text.at_once(setting.batch) * graph for text in (work.forward, work.backward, work.held_out)]
    calibrate = max(block + max(per_batch[:2]), head) + work.sums
    waiting = (work.forward.tokens + work.backward.tokens * (shapes.blocks + 1)) * width

    def placed(taken: int, states: int) -> Bytes:
        taken += work.more
        if setting.stream == "disk":
            return Bytes(taken, disk=states)
        beside = setting.stream == "cpu" and shapes.accelerator
        return Bytes(taken, host=states) if beside else Bytes(taken + states)

    whole = graph + 2 * item * shapes.vocabulary  # of forwards that do not go block by block
    curves = work.curves.at_once(setting.batch) * (whole + width * shapes.blocks) + work.columns
    tasks = block + work.tasks.at_once(None) * whole
    return {
        "calibrate": placed(calibrate, waiting),
        "score": placed(max(block, outside) + work.sums, 0),
        "curves": placed(max(block, outside) + curves, 0),
        "reconstruct": placed(2 * max(block, outside) + work.refit, work.refit_states * item),
        "evaluate": placed(max(block + per_batch[2], head, tasks), 3 * work.held_out.tokens * width),
        "save": placed(2 * max(block, outside), 0),
    }


def all_stage_bytes(shapes: Shapes, work: Workload, setting: Setting, processes: Processes) -> dict[str, Bytes]:
    """`stage_bytes` of all processes on this machine: they share the windows, and the first one does the rest."""
    part = {name: processes.share(getattr(work, name)) for name in ("forward", "backward", "held_out")}
    found = stage_bytes(shapes, replace(work, **part), setting)
    weights = 0 if setting.stream else (shapes.weights - setting.elsewhere) * setting.item
    idle = Bytes(weights, 0 if setting.stream else setting.beside * setting.item)
    on_device = processes.on_device if shapes.accelerator else processes.here

    def together(one: Bytes, other: Bytes) -> Bytes:
        others = processes.here - 1
        device = one.device + (on_device - 1) * other.device
        return Bytes(device, one.host + others * other.host, one.disk + others * other.disk)

    return {stage: together(one, one if stage in _SHARED else idle) for stage, one in found.items()}


def refit_of(model: Any, sites: Sequence[FFNSite], windows: Windows, *, distils: bool = False) -> tuple[int, int]:
    """Values of hidden states and further bytes of a sequential reconstruction; see `reconstruct_sequential`."""
    size = next(iter(model.parameters())).element_size()
    states = 2 * windows.n_tokens * max(s.d_model for s in sites)
    channels = max(windows.n_tokens * s.d_ff * size for s in sites)
    sums = max(2 * 8 * (s.d_ff**2 + s.d_model * s.d_ff) for s in sites)
    if distils:
        trained = 6 * 4 * max(3 * s.d_ff * s.d_model for s in sites)
        return states, token_bytes(model, sites, windows.n_tokens) + max(2 * sums, trained)
    return states, min(channels, 2**30) + 2 * sums  # the least squares hold as much again


def curve_bytes(
    model: Any, sites: Sequence[FFNSite], rounds: CurveRounds, windows: Windows, statistics: int
) -> tuple[Load, int]:
    """The text on which curves are measured, and bytes beside its logits and hidden states: see `measure_curves`.

    ``statistics``: bytes of those with which every cut is refitted; 0 = none is.
    """
    size, batch = next(iter(model.parameters())).element_size(), rounds.options.batch_size
    text = load_of_text([rounds.windows(windows)], batch)
    shares = (*rounds.options.shares, 1.0) if rounds.rounds > 1 else rounds.options.shares
    columns = size * sum(s.d_model * s.d_ff for s in sites) * math.ceil(sum(shares)) if statistics else 0
    solved = 4 * 8 * max(s.d_ff**2 + s.d_model * s.d_ff for s in sites) if statistics else 0
    return text, statistics + columns + solved
