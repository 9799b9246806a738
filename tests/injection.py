"""Faults at random points of `ffnscope run` (also streamed, also a sweep), `prune` and `score`."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from typer.testing import CliRunner

from checkpoints import make_checkpoint
from ffnscope.cli import answer, app, score, sparsify
from ffnscope.errors import ArtifactError, ConfigError, SweepError
from ffnscope.run import load_config, load_sweep, run, run_sweep
from ffnscope.run.progress import Reporter
from runs import results, small_run

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


TOLD = (ArtifactError, ConfigError, SweepError)
"""How a fault is told; a sweep tells it of its cells."""
PAGE = 4096
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


class Died(BaseException):
    """The process ends here."""


@dataclass
class Watch:
    """Counts the file operations that change something below a folder, and makes one of them fail.

    Attributes:
        root: the folder.
        at: number of the operation, from 1; None only counts.
        kind: "interrupt" (it raises), "death" (so does every later one, clean-up too), "full disk" (from then on
            nothing can be opened to write), "full disk in a write" (from then on no file grows beyond ``size`` bytes,
            so that a write fails in the middle: EFBIG in the place of ENOSPC), "kill" (SIGKILL).
        size: in bytes.
    """

    root: str
    at: int | None = None
    kind: str = "interrupt"
    size: int = 0
    count: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and bool(arguments[2] & WRITES)
        if not (opens or event in CHANGES) or not str(arguments[0]).startswith(self.root):
            return
        self.count += 1
        if self.at is None or self.count < self.at or (self.kind == "interrupt" and self.count > self.at):
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.kind.startswith("full disk"):
            raise Died
        if self.kind == "full disk in a write":
            _limit_files(self.size)
        elif opens:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


def _limit_files(size: int | None) -> None:
    """No file of this process may be longer; None = as long as before."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


_watching: list[Watch] = []
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        _watching[-1](event, arguments)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Let a watch see all file operations of this process within the block."""
    if not _hooked:
        sys.addaudithook(_hook)  # cannot be taken away again
        _hooked.append(True)
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.pop()
        _limit_files(None)


SERVER = multiprocessing.get_context("forkserver")  # imports once, and makes a process of its own for every kill
SERVER.set_forkserver_preload(["ffnscope.cli", "ffnscope.run", "transformers.models.llama.modeling_llama"])


def _command(root: str, at: int | None, arguments: list[str]) -> None:
    """What a process that is to be killed does: the command, without a word."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with watching(Watch(root, at, "kill")):
        app(arguments)


@dataclass
class Work:
    """A command on a tiny checkpoint.

    Attributes:
        name: "run", "streamed run" (hidden states on disk, a reconstruction, checkpoints), "sweep" (two cells), "prune"
            or "score" (of two calibrations, compared).
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


@dataclass
class Faults:
    """Makes faults and counts what came of them: (command, fault, outcome) -> how often."""

    work: Work
    seed: int
    table: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.work.fresh()
        with watching(Watch(str(self.work.root / "work"))) as watch:
            self.work.start()
        self.operations, self.whole = watch.count, self.work.made()
        self.seconds = self._seconds()

    def broken_off(self, kind: str) -> str:
        """Break off a new start at a random file operation, as `Watch` says; returns what an error told."""
        self.work.fresh()
        at, size = self.rng.randint(1, self.operations), self.rng.randint(1, 500)
        watch = Watch(str(self.work.root / "work"), at, kind, size)
        with watching(watch):
            try:
                self.work.start()
            except Died:
                return ""
            except TOLD as error:
                assert "cannot write" in str(error) and "work" in str(error), error
                assert "Make room" in str(error) or kind == "full disk in a write", error
                return str(error)
        assert kind.startswith("full disk"), "every operation was passed"  # the log alone could not be written
        return ""

    def stopped(self, kind: str) -> None:
        """An interrupt, a death or a full disk; then the same call again."""
        told = self.broken_off(kind)
        while kind.startswith("full disk") and not told:  # no file but the log was written after that
            told = self.broken_off(kind)
        self.again(kind)

    def small_disk(self) -> None:
        """A file system of random size, on which a write fails; then the same call, on a larger one."""
        most = 2 * sum(path.stat().st_size for path in self.work.root.joinpath("work").rglob("*") if path.is_file())
        while True:
            self.work.fresh()
            with file_system(self.work.root / "work", self.rng.randint(1, max(1, most // PAGE)) * PAGE) as enlarge:
                try:
                    self.work.start()
                except TOLD as error:
                    assert "cannot write" in str(error) and "Make room" in str(error), error
                    enlarge()
                    self.again("full disk, of a small file system")
                    return

    def killed(self, *, at_time: bool) -> None:
        """SIGKILL of a child at a random file operation, or at a random time between its first file and its end."""
        while True:
            self.work.fresh()
            child = self._child(None if at_time else self.rng.randint(1, self.operations))
            if at_time:
                time.sleep(self.rng.uniform(0, self.seconds))
                child.kill()
            child.join(timeout=300)
            assert child.exitcode in (-signal.SIGKILL, *((0,) if at_time else ())), child.exitcode
            if not self._finished():
                break
        self.again(f"kill -9 at a random {'time' if at_time else 'file operation'}")

    def _child(self, at: int | None) -> Any:
        """A process that does the work, and has written its first file, or has ended."""
        child = SERVER.Process(target=_command, args=(str(self.work.root / "work"), at, self.work.arguments))
        child.start()
        while at is None and not self.work.files() and child.exitcode is None:
            time.sleep(0.005)
        return child

    def _seconds(self) -> float:
        """From the first file of a process to its end."""
        self.work.fresh()
        child = self._child(None)
        start = time.perf_counter()
        child.join(timeout=300)
        assert child.exitcode == 0 and self._finished(), child.exitcode
        return time.perf_counter() - start

    def _finished(self) -> bool:
        """Whether everything was made, and nothing was left to do."""
        left = [path for path in self.work.out.parent.iterdir() if path != self.work.out]
        return not left and self.work.out.exists() and self.work.results() == self.whole

    def damaged(self, kind: str, *, finished: bool = False) -> None:
        """A flipped bit in, or the end cut from, a random file of broken-off or finished work."""
        while True:
            if finished:
                self.work.fresh()
                self.work.start()
            else:
                self.broken_off("death")
            if self.work.files():
                break
        path = self.rng.choice(self.work.files())
        content = bytearray(path.read_bytes())
        place = self.rng.randrange(len(content))
        if kind == "truncated":
            del content[place:]
        else:
            content[place] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        told = self.again(f"{kind}, {'finished' if finished else 'broken off'}", path)
        if path.suffix == ".safetensors" and finished:
            assert path.name in told, f"{path} was damaged, and nobody said so: {told}"

    def again(self, fault: str, damaged: Path | None = None) -> str:
        """The same call once more must give what the unbroken one gave, or say which file is damaged and what to do."""
        try:
            told = self.work.start()
            outcome = "told, made again" if damaged is not None and damaged.name in told else "went on"
        except TOLD as error:
            told = str(error)
            if "already exists" in told:  # it was complete; only the working folder was left
                return self.complete(fault, told, damaged)
            assert damaged is not None and damaged.name in told, f"{fault}: {told}"
            assert "Delete it" in told or "--overwrite" in told, told
            if "Delete it" in told:
                damaged.unlink()
            self.work.start(overwrite="Delete it" not in told)
            outcome = "refused, told what to do"
        other = unequal(self.work.made(), self.whole)
        assert not other, f"{fault}: {other} are not those of the unbroken {self.work.name}"
        self.note(fault, outcome)
        return told

    def complete(self, fault: str, told: str, damaged: Path | None) -> str:
        """Work that was broken off after its result had appeared: that is refused, or replaced if one asks so."""
        assert not self.work.is_run
        if damaged is None or self.work.out not in damaged.parents:
            assert self.work.results() == self.whole, fault
        self.work.start(overwrite=True)
        assert self.work.made() == self.whole, fault
        self.note(fault, "was complete: refused to replace it")
        return told

    def changed(self, what: str, change: Callable[[], Callable[[], None]]) -> None:
        """Another model or text between two calls; ``change`` makes it and returns how to take it back."""
        while True:
            self.broken_off("death")
            if any(path.suffix == ".safetensors" for path in self.work.files()):
                break
        back = change()
        try:
            told = self.work.start()
        except TOLD as error:
            told = str(error)
            outcome = "refused, told what to do"
            assert "--overwrite" in told
            self.work.start(overwrite=True)
        else:
            outcome = "told, made again"
        assert what in told, told
        found, measured = self.work.made(), self.work.measured()
        self.work.fresh()
        self.work.start()
        # files of sums keep the rows of plans that were replaced
        other = [name for name in unequal(found, self.work.made()) if name not in measured]
        other += [name for name, rows in self.work.measured().items() if not rows.items() <= measured[name].items()]
        assert not other, f"{what}: something of the old one was used in {other} after: {told}"
        back()
        self.note(f"{what} changed", outcome)

    def both(self) -> None:
        """A second process in the same folder."""
        from ffnscope.apply.folder import held

        self.work.fresh()
        folder = self.work.unfinished
        folder.mkdir(parents=True)
        with held(folder):
            try:
                self.work.start()
            except ArtifactError as error:
                assert "another process" in str(error)
            else:
                raise AssertionError("two processes worked in one folder")
        self.again("two processes, then one")

    def note(self, fault: str, outcome: str) -> None:
        """Count an outcome."""
        key = (self.work.name, fault, outcome)
        self.table[key] = self.table.get(key, 0) + 1


@contextmanager
def file_system(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Within the block, a folder is a file system of ``size`` bytes; yields what makes it large.

    Raises:
        PermissionError: this process may not mount one.
    """
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        raise PermissionError(made.stderr.strip())
    try:
        yield lambda: [subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True), None][1]
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    try:
        with file_system(folder, PAGE):
            return True
    except (PermissionError, FileNotFoundError):
        return False


def unequal(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that differ, or that are in one only."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


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


def all_faults(work: Work, seed: int, *, kills: int = 5, times: int = 4, disk: bool = False) -> Faults:
    """Every kind of fault ``times`` times or less, and ``kills``: 30 and these on a run, 26 on a pruning by default.

    With ``disk``, also ``times`` full file systems, which not every process may mount.
    """
    made = Faults(work, seed)
    for kind in ("interrupt", "death", "full disk", "full disk in a write"):
        for _ in range(times - (kind == "full disk in a write")):
            made.stopped(kind)
    for kind in ("bit flipped", "truncated"):
        for _ in range(times):
            made.damaged(kind)
    if disk:
        for _ in range(times):
            made.small_disk()
    if work.is_run:
        for _ in range(times - 1):
            made.damaged("bit flipped", finished=True)
        made.damaged("truncated", finished=True)
    for index in range(kills):
        made.killed(at_time=index % 2 == 1)
    made.changed("the model", another_model(work))
    made.changed("the calibration text", another_text(work))
    made.both()
    return made
