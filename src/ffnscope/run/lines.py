"""The lines of an estimate: one for every stage, with what it reads and about how long it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Line:
    """One stage: what it reads, and how long it would take (None = seconds).

    Attributes:
        stage: name.
        what: in words.
        seconds: of the whole model in memory.
        reads: how often a streamed model reads all weights.
        again: seconds that a streamed model computes more, since it runs blocks again to go backward.
        shared: whether several processes share its windows; each of them reads all weights.
    """

    stage: str
    what: str
    seconds: float | None = None
    reads: int = 0
    again: float = 0.0
    shared: bool = False

    def among(self, n_processes: int) -> Line:
        """The line where so many processes compute, as long as each has a device or cores of its own."""
        if not self.shared or self.seconds is None:
            return self
        return replace(self, seconds=self.seconds / n_processes, again=self.again / n_processes)


def with_more(line: Line, seconds: float) -> Line:
    """The line with a longer time; one whose time is a few seconds stays as it is if it takes no longer."""
    return replace(line, seconds=(line.seconds or 0.0) + seconds) if seconds else line


def duration(seconds: float) -> str:
    """A time in the unit that suits it; NaN is unknown."""
    if math.isnan(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_lines(lines: Sequence[Line], title: str, console: Console) -> None:
    """Print what each stage would do and about how long it would take."""
    table = Table("stage", "what", "about", title=Text(f"{title}: nothing was computed (--dry-run)"))
    for line in lines:
        about = "seconds" if line.seconds is None else duration(line.seconds)
        table.add_row(Text(line.stage), Text(line.what), about)
    console.print(table)
