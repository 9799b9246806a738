"""The sums of an unfinished pass in one file, so that a pass that was cut off goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.io import read_stats, write_stats


class Checkpoint:
    """Saves and restores the sums of a pass.

    Args:
        path: the file; it is removed when the pass ends.
        every: windows between two savings.
        key: hash of everything that the sums depend on. A file with another key is ignored and overwritten.
    """

    def __init__(self, path: Path, every: int, key: str):
        self.path = path
        self.every = every
        self.key = key
        self._pending = 0

    def resume(self, accumulator: Accumulator) -> int:
        """Restore the sums and return the first step that is still to run; 0 without a file of this pass.

        Raises:
            ArtifactError: the file is damaged or not a checkpoint.
        """
        if not self.path.exists():
            return 0
        stats, facts = read_stats(self.path)
        if facts.get("key") != self.key:
            return 0
        accumulator.restore(stats.values())
        return int(facts["next_step"])

    def after(self, index: int, n_windows: int, accumulator: Accumulator) -> None:
        """Note that step ``index`` with ``n_windows`` windows is done; save the sums when enough are."""
        self._pending += n_windows
        if self._pending >= self.every:
            stats = accumulator.result(copy=False).values()
            write_stats(self.path, stats, {"key": self.key, "next_step": index + 1})
            self._pending = 0

    def finish(self) -> None:
        """Remove the file: the pass is done."""
        self.path.unlink(missing_ok=True)
