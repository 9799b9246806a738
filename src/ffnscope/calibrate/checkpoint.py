"""The sums of an unfinished pass in one file, so that a pass that was cut off goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.sweep_files import SweepFiles
from ffnscope.io import disposable, read_stats, write_stats


class Checkpoint:
    """Saves and restores the sums of a pass.

    Args:
        path: the file; when the pass ends it is removed, or kept as its result.
        every: windows between two savings.
        key: hash of everything that the sums depend on. A file with another key is ignored and overwritten.
    """

    def __init__(self, path: Path, every: int, key: str):
        self.path = path
        self.every = every
        self.key = key
        self.blocks = SweepFiles(path.with_suffix(".sweep"), key)
        """What a streamed pass saves on its way: sums alone mean nothing in the middle of it."""
        self._pending = 0
        self._saved = 0

    def resume(self, accumulator: Accumulator) -> int:
        """Restore the sums and return the first step that is still to run; 0 without a file of this pass.

        Raises:
            ArtifactError: the file is damaged or not a checkpoint.
        """
        if not self.path.exists():
            return 0
        with disposable("the pass starts anew"):
            stats, facts = read_stats(self.path)
        if facts.get("key") != self.key:
            return 0
        accumulator.restore(stats.values())
        self._saved = int(facts["next_step"])
        return self._saved

    def after(self, index: int, n_windows: int, accumulator: Accumulator) -> None:
        """Note that step ``index`` with ``n_windows`` windows is done; save the sums when enough are."""
        self._pending += n_windows
        if self._pending >= self.every:
            self._save(index + 1, accumulator)

    def finish(self, n_steps: int, accumulator: Accumulator, *, keep: bool) -> None:
        """End a pass of ``n_steps``: remove the files, or ``keep`` the final sums in the one of them."""
        if not keep:
            self.path.unlink(missing_ok=True)
        elif self._saved < n_steps:
            self._save(n_steps, accumulator)
        self.blocks.remove()

    def _save(self, next_step: int, accumulator: Accumulator) -> None:
        stats = accumulator.result(copy=False).values()
        write_stats(self.path, stats, {"key": self.key, "next_step": next_step})
        self._pending, self._saved = 0, next_step
