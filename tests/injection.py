"""Faults at random points of `ffnscope run` (also streamed, also a sweep), and of commands that go on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffnscope.cli import app
from ffnscope.errors import ArtifactError, ConfigError, SweepError
from injection_files import PAGE, Died, Watch, file_system, watching
from injection_work import Work, another_model, another_text

TOLD = (ArtifactError, ConfigError, SweepError)
"""How a fault is told; a sweep tells it of its cells."""
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
            begun = any(path.suffix == ".safetensors" for path in self.work.files())
            if begun and self.work.results() != self.whole:
                break
        back = change()
        try:
            outcome = self._after(what)
        finally:
            back()
        self.note(f"{what} changed", outcome)

    def _after(self, change: str) -> str:
        """The same call once more must tell a change, and use nothing of the old one; returns what it did."""
        outcome = "told, made again"
        try:
            told = self.work.start()
        except TOLD as error:
            told, outcome = str(error), "refused, told what to do"
            assert "--overwrite" in told
            self.work.start(overwrite=True)
        assert change in told, told
        found, measured = self.work.made(), self.work.measured()
        self.work.fresh()
        self.work.start()
        # files of sums keep the rows of plans that were replaced
        other = [name for name in unequal(found, self.work.made()) if name not in measured]
        other += [name for name, rows in self.work.measured().items() if not rows.items() <= measured[name].items()]
        assert not other, f"{change}: something of the old one was used in {other} after: {told}"
        return outcome

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


def unequal(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that differ, or that are in one only."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


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
