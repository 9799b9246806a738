"""Training with the penalty, by the Trainer of transformers: steps, checkpoints, and what is measured on the way."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.forward import memory_errors
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, NonFiniteError, UsageError, unknown_name
from ffnscope.ffn.messages import quiet_transformers
from ffnscope.io import SCHEMA, complete, disposable, expect_kind, hash_file, read_state, write_state
from ffnscope.saving import writing
from ffnscope.sparse.relu.activation import ACTIVATIONS, check_threshold
from ffnscope.sparse.relu.measure import measure_zeros
from ffnscope.sparse.relu.penalty import Penalty, ProgressiveL1
from ffnscope.types import FFNSite

STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
SUMS = "ffnscope_files.json"  # hashes of all files of a checkpoint
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ReluOptions:
    """How a model is turned into a ReLU model.

    Attributes:
        activation: "relu", or "relu2" for its square (ReLU² Wins, arXiv:2402.03804).
        threshold: of FATReLU during the training; 0 trains a plain ReLU.
        steps: optimizer steps.
        batch_size: windows per forward and backward.
        accumulate: forwards per step.
        learning_rate: of AdamW at its highest: it rises for a twentieth of the steps, then falls along a cosine.
        penalty: weight of the L1 penalty over the steps.
        measure_every: steps between two measurements, with a checkpoint after each; None for a tenth of the steps.
        rise: how much the thresholds at the end may raise the perplexity of calibration windows, as a share of it;
            None leaves them at 0.
        seed: of the order of the windows and of dropout.

    Raises:
        UsageError: a number is impossible, or thresholds are asked for twice.
    """

    activation: str = "relu"
    threshold: float = 0.0
    steps: int = 200
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    penalty: ProgressiveL1 = field(default_factory=ProgressiveL1)
    measure_every: int | None = None
    rise: float | None = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        for name in ("steps", "batch_size", "accumulate", "measure_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}.")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be positive; got {self.learning_rate:g}.")
        if self.rise is not None and not 0 <= self.rise < math.inf:
            raise UsageError(f"rise must be 0 or more, such as 0.005 for half a percent; got {self.rise:g}.")
        if check_threshold(self.threshold) > 0 and self.rise is not None:
            raise UsageError(
                f"a model that is trained with the threshold {self.threshold:g} keeps it, so none is calibrated at the "
                "end. Set rise to None (--no-shift), or the threshold to 0."
            )

    @property
    def every(self) -> int:
        """Steps between two measurements."""
        return self.measure_every or max(1, self.steps // 10)


@dataclass(slots=True, eq=False)
class Progress:
    """What was measured, as rows that are also in a file."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @staticmethod
    def read(path: Path) -> Progress:
        """The rows of a file that may not be there yet; raises ArtifactError for a damaged one."""
        if not path.exists():
            return Progress(path)
        with disposable("the training goes on without what it has measured"):
            value = read_state(path)
            expect_kind(path, value, "relufy progress")
            with complete(path, "relufy progress"):
                return Progress(path, list(value["rows"]))

    def add(self, **row: Any) -> None:
        """Add a row."""
        self.rows.append(row)
        self.save()

    def go_back(self, step: int) -> None:
        """Forget what was measured after a step."""
        self.rows = [row for row in self.rows if row["step"] <= step and row["stage"] not in ("trained", "shifted")]
        self.save()

    def has(self, stage: str) -> bool:
        """Whether there is a row of a stage."""
        return any(row["stage"] == stage for row in self.rows)

    def save(self) -> None:
        """Write all rows."""
        write_state(self.path, {"kind": "relufy progress", "schema": SCHEMA, "rows": self.rows})


@dataclass(slots=True, eq=False)
class Training:
    """One training: what it reads, and sums since the last measurement."""

    model: Any
    sites: Sequence[FFNSite]
    windows: Windows
    held_out: Windows
    options: ReluOptions
    progress: Progress
    on_step: OnStep | None = None
    _sums: dict[str, float] = field(default_factory=dict[str, float])

    def run(self, folder: Path) -> None:
        """Train, or go on from the last checkpoint in ``folder``.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            DeviceError: the accelerator is out of memory.
            ArtifactError: a checkpoint cannot be written.
        """
        last = last_checkpoint(folder)
        done = 0 if last is None else int(last.name.rpartition("-")[2])
        self.progress.go_back(done)
        trainer = _trainer_class(self)(
            model=self.model,
            args=_arguments(self.options, folder, next(self.model.parameters()).device),
            train_dataset=examples(self.windows),
            callbacks=[_callback_class(self)()],
        )
        _silence(trainer)
        cure = "lower the batch size, accumulate more, or shorten windows"
        with quiet_transformers(), memory_errors(f"out of memory while training; {cure}."):
            if done == self.options.steps:  # the Trainer would take one more step
                trainer.restore(str(last))
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.eval()

    def loss(self, language: Tensor, penalty: Penalty, done: float, share: float) -> Tensor:
        """Loss of a forward, and note its parts. ``share`` is what this forward is of its step."""
        weight, size = self.options.penalty.weight(done), penalty.size()
        total = language + weight * share * size.to(language.device)
        if not bool(torch.isfinite(total)):
            raise NonFiniteError(
                f"the training loss became NaN or infinite at {done:.0%} of the steps; lower the learning rate or the "
                "weight of the penalty."
            )
        parts = {"l1": share * float(size.detach()), "zeros": share * penalty.zeros()}
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        return total

    def note_language(self, value: float) -> None:
        """Add to the language modelling loss of the step."""
        self._sums["loss"] = self._sums.get("loss", 0.0) + value

    def after_step(self, step: int, learning_rate: float) -> None:
        """Measure where it is time to."""
        options = self.options
        if self.on_step is not None:
            self.on_step(step, options.steps)
        self._sums["steps"] = self._sums.get("steps", 0.0) + 1
        if step % options.every and step < options.steps:
            return
        sums, self._sums = self._sums, {}
        means = {name: sums[name] / sums["steps"] for name in ("loss", "l1", "zeros")}
        found = measure_zeros(self.model, self.held_out, self.sites, batch_size=options.batch_size)
        self.progress.add(
            stage="training",
            step=step,
            tokens=step * options.batch_size * options.accumulate * self.windows.length,
            train_loss=means["loss"],
            train_l1=means["l1"],
            train_sparsity=means["zeros"],
            l1_weight=options.penalty.weight((step - 1) / options.steps),
            learning_rate=learning_rate,
            **found.row(),
        )


def examples(windows: Windows) -> list[dict[str, Tensor]]:
    """Rows for the Trainer, one per window: input_ids, attention_mask and labels [T] of int64.

    Tokens that do not count in the loss have the label -100.
    """
    labels = windows.input_ids.masked_fill(~windows.targets, -100)
    parts = zip(windows.input_ids, windows.valid.long(), labels, strict=True)
    return [{"input_ids": ids, "attention_mask": valid, "labels": row} for ids, valid, row in parts]


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder; those that were cut off while they were written are removed.

    Warns:
        UserWarning: a file of one is not what was written; it is removed too.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        damaged = _damaged(path)
        if damaged is not None:
            message = f"{damaged} is damaged, so its checkpoint is removed, and what was trained up to it is lost."
            warnings.warn(message, stacklevel=2)
        if damaged is None and (path / STATE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            with writing(path):
                shutil.rmtree(path)
    return found[max(found)] if found else None


def note_files(checkpoint: Path) -> None:
    """Keep the hashes of all files of a checkpoint beside them."""
    files = {path.name: hash_file(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_state(checkpoint / SUMS, {"files": files})


def _damaged(checkpoint: Path) -> Path | None:
    """A file of a checkpoint that is not what was written; None also where a kill left no hashes."""
    sums = checkpoint / SUMS
    if not sums.exists():
        return None
    try:
        files: dict[str, str] = read_state(sums)["files"]
    except ArtifactError:
        return sums
    paths = {checkpoint / name: digest for name, digest in files.items()}
    return next((path for path, digest in paths.items() if not path.exists() or hash_file(path) != digest), None)


def _arguments(options: ReluOptions, folder: Path, device: torch.device) -> Any:
    from transformers import TrainingArguments

    cuda = device.type == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        save_strategy="steps",
        save_steps=options.every,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=device.type == "cpu",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=cuda,
    )


def _trainer_class(job: Training) -> Any:
    from transformers import Trainer

    class PenaltyTrainer(Trainer):
        """Adds the penalty to the loss of every forward."""

        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The loss of the language model and the penalty."""
            targets = int((inputs["labels"] != -100).sum())
            items: Any = num_items_in_batch if self.model_accepts_loss_kwargs else None
            penalty = Penalty(job.sites)
            with penalty.of(job.model, inputs["attention_mask"].bool()):
                found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
            language, outputs = found
            # a mean over this forward is divided by the number of forwards later, a sum over the step's targets is not
            share = 1.0 if items is None else targets / float(items)
            job.note_language(float(language.detach()) * (1 / job.options.accumulate if items is None else 1.0))
            total = job.loss(language, penalty, self.state.global_step / job.options.steps, share)
            return (total, outputs) if return_outputs else total

        def restore(self, path: str) -> None:
            """Load the weights of a checkpoint."""
            self._load_from_checkpoint(path)

        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            with writing(Path(str(self.args.output_dir))):
                super()._save_checkpoint(*given, **named)

    return PenaltyTrainer


def _silence(trainer: Any) -> None:
    """Let the Trainer print nothing: progress is told by callbacks of the caller."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _callback_class(job: Training) -> Any:
    from transformers import TrainerCallback

    class Measuring(TrainerCallback):
        """Measures before the Trainer writes a checkpoint, whose files it hashes afterwards."""

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """After each optimizer step."""
            job.after_step(state.global_step, float(others["lr_scheduler"].get_last_lr()[0]))

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """After each checkpoint."""
            note_files(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Measuring
