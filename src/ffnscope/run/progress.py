"""Progress on a terminal and in a log: stage, share done, rate and time left."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ffnscope.saving import writing

LOG = logging.getLogger("ffnscope.run")
QUIET_SECONDS = 15.0

Update = Callable[[int, int], None]


class Reporter:
    """Tells what a run does, on a console and in ``run.log``.

    On a terminal each stage has a bar; elsewhere (a file, CI) a line appears every few seconds.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Print one line and log it."""
        LOG.info(text)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, name: str, unit: str) -> Generator[Update]:
        """Yield ``update(done, total)`` for one stage; ``unit`` is what is counted, e.g. "tokens"."""
        start = time.perf_counter()
        meter = _Meter()
        LOG.info("%s: started", name)
        with self._bar(name, unit, meter) as show:

            def update(done: int, total: int) -> None:
                meter.note(done)
                show(done, total)

            yield update
        self.say(f"{name}: {time.perf_counter() - start:.1f} s" + (f", {meter.told} {unit}/s" * (meter.rate > 0)))

    @contextlib.contextmanager
    def _bar(self, name: str, unit: str, meter: _Meter) -> Generator[Update]:
        if not self.console.is_terminal:
            yield self._lines(name, unit, meter)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(name, total=None, rate="")

            def show(done: int, total: int) -> None:
                rate = f"{meter.told} {unit}/s" if meter.rate else ""
                progress.update(bar, completed=done, total=total, rate=rate)

            yield show

    def _lines(self, name: str, unit: str, meter: _Meter) -> Update:
        last = time.perf_counter()

        def show(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= QUIET_SECONDS:
                last = now
                left = f", about {(total - done) / meter.rate:.0f} s left" if meter.rate else ""
                self.say(f"{name}: {done:,} of {total:,} {unit}{left}")

        return show


@dataclass(slots=True)
class _Meter:
    """Rate since the first update: a stage that goes on begins with what an earlier process did."""

    begun: tuple[float, int] | None = None
    rate: float = 0.0

    def note(self, done: int) -> None:
        now = time.perf_counter()
        if self.begun is None:
            self.begun = (now, done)
        elif now > self.begun[0]:
            self.rate = (done - self.begun[1]) / (now - self.begun[0])

    @property
    def told(self) -> str:
        """The rate in words; a slow one is not rounded to 0."""
        return f"{self.rate:,.0f}" if self.rate >= 9.5 else f"{self.rate:.2g}"


class _LogFile(logging.FileHandler):
    """A log that cannot be written (full disk) neither stops the run nor fills the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on without this line."""

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(path: Path) -> Generator[None]:
    """Append what the run says, every warning of Python's log, and what stopped the run, to a file.

    Raises:
        ArtifactError: the file cannot be opened.
    """
    with writing(path):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = LOG.level
    root.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        LOG.error("stopped by %s: %s", type(error).__name__, error)
        raise
    finally:
        LOG.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, in bytes: resident, and on the accelerators where there are any."""
    found = {"resident": _peak_resident()}
    if torch.cuda.is_available():
        found["cuda"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
