"""Turn a model into a ReLU model: replace, train with the penalty, shift thresholds, measure all along, save."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffnscope.apply.export import save_model, write_card
from ffnscope.apply.folder import held, refuse_existing, replacing_folder, sweep
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, ModelError, UsageError
from ffnscope.evaluate.perplexity import check_targets
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import SCHEMA, disposable, hash_json, read_state, write_json, write_state, write_text
from ffnscope.saving import check_writable, writing
from ffnscope.sparse.relu.activation import replace_activation_, set_thresholds_
from ffnscope.sparse.relu.card import relu_card
from ffnscope.sparse.relu.measure import measure_zeros
from ffnscope.sparse.relu.thresholds import THRESHOLDS, OnTrial, calibrate_thresholds, write_thresholds
from ffnscope.sparse.relu.training import OnStep, Progress, ReluOptions, Training
from ffnscope.types import FFNSite

RECORD, PROGRESS = "relufy.json", "progress.jsonl"
ASKED, MEASURED = "asked.json", "progress.json"
"""Of an unfinished call."""
CALIBRATION = 16  # windows that are kept from the training for the thresholds, at most


_NAMES = {
    "weights_hash": "the model",
    "text": "the calibration text",
    "held_out": "the held-out text",
    "options": "the options",
    "versions": "the versions of torch and transformers",
}
"""What a call is made with, in words."""


@dataclass(frozen=True, slots=True)
class ReluModel:
    """What `relufy_` made.

    Attributes:
        path: folder of the checkpoint.
        sites: its FFNs.
        rows: what was measured: of the dense model, the replaced one, during the training, at its end, with thresholds.
        thresholds: site -> threshold of FATReLU; empty where there are none.
    """

    path: Path
    sites: Sequence[FFNSite]
    rows: Sequence[Mapping[str, Any]]
    thresholds: Mapping[FFNSite, float]


@dataclass(frozen=True, slots=True)
class Watch:
    """Callbacks of a long call.

    Attributes:
        on_step: optimizer steps.
        on_trial: forward passes of the calibration of thresholds.
        on_folder: called with the whole output, before it gets its name, and the measurements: to add to it.
    """

    on_step: OnStep | None = None
    on_trial: OnTrial | None = None
    on_folder: Callable[[Path, Sequence[Mapping[str, Any]]], None] | None = None


def relufy_(
    loaded: LoadedModel,
    text: Windows,
    held_out: Windows,
    out: Path,
    *,
    options: ReluOptions | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> ReluModel:
    """Make a model with exact zeros out of one without, in place, and save it as a checkpoint.

    As ProSparse (arXiv:2402.13516) does it: the activation of all FFNs becomes ReLU; all weights are trained on the
    text with a penalty on the mean |h| whose weight grows; at the end thresholds are shifted. Differences: stages are
    shares of the steps, the penalty is the mean over FFNs of the mean over tokens and channels, and each FFN has a
    threshold of its own (see `calibrate_thresholds`), calibrated on up to 16 windows at the end of the text, a quarter
    at most, that are not trained on.

    The checkpoint holds plain ReLUs and loads with plain `transformers`. Thresholds are in no config that it knows:
    they are in ``thresholds.json`` beside the weights; `set_thresholds_(model, read_thresholds(file))` applies them.
    ``progress.jsonl`` has all measurements, ``relufy.json`` what was asked.

    The training is in float32 (under bfloat16 autocast on CUDA), with one device; the checkpoint and the measurements
    at the end are in the dtype that the model came in. A call that was cut off goes on from the last checkpoint, which
    is in a hidden folder beside ``out``. The random state of Python, NumPy and torch is set.

    Args:
        loaded: model and tokenizer. After an error the model is partly changed.
        text: windows to train on.
        held_out: windows to measure on.
        out: folder to make.
        options: see `ReluOptions`.
        overwrite: replace ``out`` and an unfinished call with other arguments.
        watch: callbacks.

    Raises:
        ArtifactError: ``out`` exists, or a call with other arguments is unfinished, without ``overwrite``; another
            process is at work on ``out``, or the state of the unfinished call is damaged.
        UsageError: fewer than two windows, nothing to predict in the held-out text, or several CUDA devices.
        NotAvailableError: the activation cannot be replaced, see `replace_activation_`.
        ModelError: weights are offloaded.
        NonFiniteError: the loss became NaN or infinite.
        DeviceError: the accelerator is out of memory.
    """
    options, watch = options or ReluOptions(), watch or Watch()
    model: Any = loaded.model
    _check(model, text, held_out, out, overwrite)
    asked = _asked(loaded, text, held_out, options)
    with _working(out, overwrite) as part:
        _begin(part, asked, overwrite)
        progress = Progress.read(part / MEASURED)
        n_kept = min(CALIBRATION, max(1, len(text) // 4))
        job = Training(model, (), text[: len(text) - n_kept], held_out, options, progress, watch.on_step)
        _train(job, part)
        thresholds = _shift(job, text[len(text) - n_kept :], watch.on_trial)
        _save(loaded, out, overwrite, asked, progress, thresholds, watch)
        with writing(part):
            shutil.rmtree(part)
    return ReluModel(out, job.sites, progress.rows, thresholds)


def unfinished_folder(out: Path) -> Path:
    """Where an unfinished call keeps its checkpoints."""
    return out.with_name(f".{out.name}.relufy.part")


def _train(job: Training, part: Path) -> None:
    """Replace and train, and measure before and after; the model then has the dtypes that it came with."""
    model, options = job.model, job.options
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if not job.progress.has("dense"):
        _measure(job, "dense", find_sites(model), 0)
    job.sites = replace_activation_(model, options.activation)
    _cast(model, dict.fromkeys(dtypes, torch.float32))
    if options.threshold:
        set_thresholds_(model, dict.fromkeys(job.sites, options.threshold))
    if not job.progress.has("replaced"):
        _measure(job, "replaced", job.sites, 0)
    job.run(part / "checkpoints")
    _cast(model, dtypes)
    _measure(job, "trained", job.sites, options.steps)


def _cast(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast parameters, but no buffers: rotary frequencies are float32 whatever the model is."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
        parameter.grad = None


def _measure(job: Training, stage: str, sites: Sequence[FFNSite], step: int) -> None:
    found = measure_zeros(job.model, job.held_out, sites, batch_size=job.options.batch_size)
    job.progress.add(stage=stage, step=step, **found.row())


def _shift(job: Training, windows: Windows, on_trial: OnTrial | None) -> dict[FFNSite, float]:
    """Thresholds of the finished model, put in and measured; empty when it has none."""
    options = job.options
    if options.rise is None:
        return dict.fromkeys(job.sites, options.threshold) if options.threshold else {}
    size = options.batch_size
    found = calibrate_thresholds(job.model, windows, job.sites, rise=options.rise, batch_size=size, on_trial=on_trial)
    set_thresholds_(job.model, found.thresholds)
    _measure(job, "shifted", job.sites, options.steps)
    facts = {"shared_error": found.error, "calibration": {"before": found.before, "after": found.after}}
    job.progress.rows[-1].update(facts)
    job.progress.save()
    return dict(found.thresholds)


def _check(model: Any, text: Windows, held_out: Windows, out: Path, overwrite: bool) -> None:
    refuse_existing(out, overwrite)
    check_writable(out.parent)
    check_targets(held_out)
    if len(text) < 2:
        raise UsageError(
            f"{text.source} has {len(text)} window(s); at least 2 are needed, one to train on and one for thresholds."
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices:
        raise ModelError("weights are offloaded, and training needs all of them in memory; load without device_map.")
    if "cuda" in devices and torch.cuda.device_count() > 1:
        raise UsageError(
            f"{torch.cuda.device_count()} CUDA devices are visible, and the penalty is computed on one. Set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )


def _asked(loaded: LoadedModel, text: Windows, held_out: Windows, options: ReluOptions) -> dict[str, Any]:
    import transformers

    return {
        **loaded.facts,
        "weights_hash": weights_hash(loaded.model),
        "text": {"source": text.source, "hash": text.hash, "windows": len(text), "length": text.length},
        "held_out": {"source": held_out.source, "hash": held_out.hash, "windows": len(held_out)},
        "options": asdict(options),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@contextlib.contextmanager
def _working(out: Path, overwrite: bool) -> Generator[Path]:
    """Hold the folder of an unfinished call, and clear away what a killed process left beside it."""
    part = unfinished_folder(out)
    with writing(part):
        part.mkdir(parents=True, exist_ok=True)
    with held(part):
        sweep(out.parent, out.name)
        refuse_existing(out, overwrite)  # another process may have finished since
        yield part


def _begin(part: Path, asked: Mapping[str, Any], overwrite: bool) -> None:
    """Go on with an unfinished call; one with other arguments is refused, or removed, also where it did nothing yet."""
    key, path = hash_json(asked), part / ASKED
    with disposable("the training begins again"):
        known = read_state(path) if path.exists() else {}
    if known.get("key") == key:
        return
    if known and (part / MEASURED).exists() and not overwrite:
        changed = [what for name, what in _NAMES.items() if hash_json([known.get(name)]) != hash_json([asked[name]])]
        raise ArtifactError(
            f"{part} is an unfinished call with others of these: {', '.join(changed) or 'the name of the model'}. Give "
            "the same ones to go on, or --overwrite to begin again."
        )
    with writing(part):
        for left in part.iterdir():  # the folder itself is held
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_state(path, {"key": key, **asked})


def _save(
    loaded: LoadedModel,
    out: Path,
    overwrite: bool,
    asked: Mapping[str, Any],
    progress: Progress,
    thresholds: Mapping[FFNSite, float],
    watch: Watch,
) -> None:
    with replacing_folder(out, overwrite) as folder:
        save_model(loaded.model, loaded.tokenizer, folder, overwrite=True)
        write_card(folder, relu_card(out.name, asked, progress.rows, thresholds))
        write_json(folder / RECORD, {"kind": "relufy", "schema": SCHEMA, **asked, "rows": progress.rows})
        write_text(folder / PROGRESS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in progress.rows))
        if thresholds:
            write_thresholds(folder / THRESHOLDS, thresholds, {"model_id": out.name})
        if watch.on_folder is not None:
            watch.on_folder(folder, progress.rows)
