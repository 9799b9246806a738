"""Progress on a terminal and in a log: stage, share done, rate and time left."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
        self.console.print(text, highlight=False, markup=False)

    @contextlib.contextmanager
    def task(self, name: str, unit: str) -> Generator[Update]:
        """Yield ``update(done, total)`` for one stage; ``unit`` is what is counted, e.g. "tokens"."""
        start = time.perf_counter()
        counted = [0]
        LOG.info("%s: started", name)
        with self._bar(name, unit) as show:

            def update(done: int, total: int) -> None:
                counted[0] = done
                show(done, total)

            yield update
        seconds = time.perf_counter() - start
        rate = f", {counted[0] / seconds:,.0f} {unit}/s" if counted[0] and seconds > 0 else ""
        self.say(f"{name}: {seconds:.1f} s{rate}")

    @contextlib.contextmanager
    def _bar(self, name: str, unit: str) -> Generator[Update]:
        if not self.console.is_terminal:
            yield self._lines(name, unit)
            return
        columns = (
            TextColumn("{task.description}"),
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
                speed = progress.tasks[0].speed
                rate = f"{speed:,.0f} {unit}/s" if speed else ""
                progress.update(bar, completed=done, total=total, rate=rate)

            yield show

    def _lines(self, name: str, unit: str) -> Update:
        start = last = time.perf_counter()

        def show(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= QUIET_SECONDS and done:
                last = now
                left = (now - start) * (total - done) / done
                self.say(f"{name}: {done:,} of {total:,} {unit}, about {left:.0f} s left")

        return show


@contextlib.contextmanager
def logging_to(path: Path) -> Generator[None]:
    """Append what the run says, and every warning of Python's log, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = LOG.level
    root.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, in bytes: resident, and on the accelerator where there is one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"resident": peak if sys.platform == "darwin" else peak * 1024}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.max_memory_allocated()
    return found
