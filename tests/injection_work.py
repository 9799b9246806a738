"""Commands on a tiny checkpoint that faults are made of, and other models and texts under the same names."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from typer.testing import CliRunner

from checkpoints import make_checkpoint
from ffnscope.cli import answer, app, score, sparsify
from ffnscope.run import load_config, load_sweep, run, run_sweep
from ffnscope.run.progress import Reporter
from runs import results, small_run

WINDOWS = ("--num-samples", 8, "--max-length", 32, "--batch-size", 4)
TRAINING = ("--steps", 2, "--measure-every", 1, "--max-length", 32, "--num-samples", 16, "--held-out-samples", 2)
DOCUMENTS = ("sparsify", "answer", "place")
"""Commands that split a text by document."""
UNFINISHED: dict[str, Callable[[Path], Path]] = {
    "prune": lambda out: out.with_name(f".{out.name}.prune.part"),
    "score": lambda out: out / score.UNFINISHED,
    "sparsify": lambda out: out / sparsify.UNFINISHED,
    "answer": lambda out: out / answer.UNFINISHED,
    "place": lambda out: out.with_name(f".{out.name}.place.part"),
    "relufy": lambda out: out.with_name(f".{out.name}.relufy.part"),
}
"""Commands but runs, whose finished output is refused: the folder that a process at work holds."""


@dataclass
class Work:
    """A command on a tiny checkpoint.

    Attributes:
        name: "run", "streamed run" (hidden states on disk, a reconstruction, checkpoints), "sweep" (two cells), or one
            of the commands in `UNFINISHED`: "score" is of two calibrations, compared.
        root: everything that it reads and writes.
    """

    name: str
    root: Path

    @property
    def out(self) -> Path:
        return self.root / "work" / ("out.json" if self.name == "place" else "out")

    @property
    def is_run(self) -> bool:
        """Whether a finished one is looked through by the next call, and not refused."""
        return self.name not in UNFINISHED

    @property
    def unfinished(self) -> Path:
        """The folder that a process at work holds."""
        return UNFINISHED[self.name](self.out) if self.name in UNFINISHED else self.out

    @property
    def arguments(self) -> list[str]:
        if self.is_run:
            return ["run", str(self.root / "run.yaml")]
        text = self.root / "texts" / "train.txt"
        if self.name in DOCUMENTS:
            text = text.with_suffix(".jsonl")
        second = text.with_name("second.jsonl")
        of = {
            "prune": ("--sparsity", 0.5, "--no-evaluate", "--method", "best", *WINDOWS),
            "score": ("-m", "wanda", "-m", "scar_loss_proxy", "--repeats", 2, *WINDOWS),
            "sparsify": ("--target", "density=0.5", "--policy", "top_k", "--curve", 0.5, *WINDOWS),
            "answer": ("--predictor", "exact_up", "--text", second, "--held-out-samples", 2, *WINDOWS),
            "place": ("--budget", 2000, "--fast-bandwidth", 100, "--slow-bandwidth", 10, "--sync", 0, *WINDOWS),
            "relufy": (*TRAINING, "--held-out-text", text.with_name("test.txt")),
        }
        given = (self.name, self.root / "model", "--out", self.out, *of[self.name], "--text", text, "--device", "cpu")
        return [str(one) for one in given]

    def prepare(self, texts: Path) -> None:
        """Write the checkpoint, the texts and the configuration."""
        make_checkpoint(self.root / "model", "llama_relu" if self.name == "place" else "llama")
        shutil.copytree(texts, self.root / "texts")
        changes: dict[str, Any] = {"evaluation": {"num_samples": 3}}
        if self.name == "streamed run":
            pruning = {"ratios": [0.5], "algorithms": ["scar_loss_proxy"], "reconstruct": "sequential"}
            changes |= {"model": {"stream": "disk"}, "pruning": pruning, "output": {"checkpoints": True}}
        if self.name == "sweep":
            changes |= {"pruning": {"ratios": [0.5]}, "sweep": {"pruning.algorithms": [["wanda"], ["scar_loss_proxy"]]}}
        config = small_run(self.root / "model", self.root / "texts", self.out, **changes)
        (self.root / "run.yaml").write_text(yaml.safe_dump(config))

    def start(self, *, overwrite: bool = False) -> str:
        """Do the work, or go on with it; returns what it told."""
        if self.is_run:
            told = io.StringIO()
            reporter = Reporter(Console(file=told, width=1000))
            path = self.root / "run.yaml"
            if self.name == "sweep":
                run_sweep(load_sweep(path), overwrite=overwrite, reporter=reporter).check()
            else:
                run(load_config(path), overwrite=overwrite, reporter=reporter)
            return told.getvalue()
        arguments = [*self.arguments, *(["--overwrite"] if overwrite else [])]
        return CliRunner().invoke(app, arguments, catch_exceptions=False).output

    def fresh(self) -> None:
        """Forget everything that was made."""
        shutil.rmtree(self.root / "work", ignore_errors=True)
        (self.root / "work").mkdir()

    def made(self) -> dict[str, str]:
        """Name -> hash of every result; nothing else may be left beside it."""
        left = [path.name for path in self.out.parent.iterdir() if path != self.out]
        left += [path.name for path in self.out.rglob(".*.tmp")]
        assert not left, f"left behind: {left}"
        return self.results()

    def results(self) -> dict[str, str]:
        """Name -> hash of every result; the record of a sweep holds times of files."""
        if self.out.is_file():
            return {self.out.name: hashlib.sha256(self.out.read_bytes()).hexdigest()}
        return {name: value for name, value in results(self.out).items() if name != "sweep.json"}

    def measured(self) -> dict[str, dict[str, Any]]:
        """Name -> rows of every file of sums per window, of pruned models by a hash of their plan and weights."""
        found = self.out.rglob("windows_*.json")
        return {path.relative_to(self.out).as_posix(): json.loads(path.read_text())["rows"] for path in found}

    def files(self) -> list[Path]:
        """What is on disk, finished or not, but the log, from which nothing is read."""
        found = (path for path in sorted((self.root / "work").rglob("*")) if path.is_file() and path.name != "run.log")
        return [path for path in found if path.stat().st_size]


def another_text(work: Work) -> Callable[[], Callable[[], None]]:
    """Change the calibration text."""
    path = work.root / "texts" / f"train.{'jsonl' if work.name in DOCUMENTS else 'txt'}"

    def change() -> Callable[[], None]:
        old = path.read_text()
        path.write_text(old.upper())
        return lambda: [path.write_text(old), None][1]

    return change


def another_model(work: Work) -> Callable[[], Callable[[], None]]:
    """Change one weight of the checkpoint."""
    from safetensors.torch import load_file, save_file

    path = work.root / "model" / "model.safetensors"

    def change() -> Callable[[], None]:
        old = path.read_bytes()
        tensors = load_file(path)
        next(value for name, value in sorted(tensors.items()) if "down_proj" in name)[1, 1] += 0.125
        save_file(tensors, path, metadata={"format": "pt"})
        return lambda: [path.write_bytes(old), None][1]

    return change
