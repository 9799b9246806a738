"""The files of an unfinished streamed pass: sums by block, the hidden states that still wait, and where it stands."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ffnscope.errors import ArtifactError
from ffnscope.io import (
    disposable,
    expect_kind,
    read_state,
    read_stats,
    read_tensors,
    write_state,
    write_stats,
    write_tensors,
)
from ffnscope.types import ChannelStats

Key = tuple[int, int]
KIND = "streamed pass"
_POSITION = "position.json"


class SweepFiles:
    """Files in a folder of their own, from which a streamed pass goes on behind the last stage that it has saved.

    A stage is one direction of one block, or the head. Its sums are a file, hidden states are one each, and
    ``position.json`` names those that count: it is replaced when all that it names is there, and what it no longer
    names is deleted after that. So a kill at any moment leaves the end of one stage. Every file has a checksum.

    Processes that share a pass keep their own parts (`of_share`), and each goes on behind its own last stage.

    Disk: sums of every block once, and the hidden states that the pass holds at the end of a stage, with those of the
    stage before while it is saved.

    Args:
        folder: where they are; removed with its files when the pass ends, unless something else is in it.
        key: hash of everything that the pass depends on. Files with another key are ignored, and deleted.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self._states: set[str] = set()
        self._sums: list[str] = []

    def of_share(self, start: int, rank: int, size: int) -> SweepFiles:
        """Those of one process among ``size``, for a pass that begins at step ``start``; of several, in a folder apart.

        `remove` of the whole removes them too.
        """
        folder = self.folder / f"process_{rank + 1}_of_{size}" if size > 1 else self.folder
        return SweepFiles(folder, f"{self.key} from {start}, {rank} of {size}")

    def resume(self) -> tuple[int, list[ChannelStats], list[Key]]:
        """Stages that are done, their sums, and which hidden states wait; (0, [], []) without files of this pass.

        Raises:
            ArtifactError: a file is damaged or foreign.
        """
        path = self.folder / _POSITION
        if not path.exists():
            return 0, [], []
        with disposable("the pass starts anew"):
            found = read_state(path)
            expect_kind(path, found, KIND)
        keys: list[Key] = [(block, batch) for block, batch in found["states"]]
        names = [*found["sums"], *map(_state_name, keys)]
        if found["key"] != self.key or not all((self.folder / name).is_file() for name in names):
            return 0, [], []
        self._sums, self._states = list(found["sums"]), set(map(_state_name, keys))
        return found["done"], [part for name in self._sums for part in self._read_sums(name)], keys

    def write_state(self, key: Key, value: Tensor) -> None:
        """Keep a hidden state or a gradient."""
        name = _state_name(key)
        write_tensors(self.folder / name, {"state": value.cpu()}, {"kind": KIND, "key": self.key})
        self._states.add(name)

    def has_state(self, key: Key) -> bool:
        """Whether one was kept."""
        return _state_name(key) in self._states

    def read_state(self, key: Key) -> Tensor:
        """One that was kept, on the CPU.

        Raises:
            ArtifactError: its file is damaged.
        """
        with disposable("the pass starts anew"):
            return read_tensors(self.folder / _state_name(key))[0]["state"]

    def end_stage(
        self, done: int, name: str, stats: Iterable[ChannelStats], waiting: Sequence[Key], before: str | None = None
    ) -> None:
        """Save where the pass stands.

        Args:
            done: stages that are done.
            name: of the one that has ended.
            stats: sums that it has changed.
            waiting: hidden states that are still read; all of them are kept here.
            before: the stage whose sums these ones contain.
        """
        part = list(stats)
        if part:
            self._sums = [one for one in self._sums if one != _sums_name(before)] + [_sums_name(name)]
            write_stats(self.folder / _sums_name(name), part, {"key": self.key})
        states = set(map(_state_name, waiting))
        facts = {"kind": KIND, "key": self.key, "done": done, "sums": self._sums, "states": sorted(map(list, waiting))}
        write_state(self.folder / _POSITION, facts)
        self._states = states
        self._delete_others({_POSITION, *self._sums, *states})

    def remove(self) -> None:
        """Remove the files, and the folder when nothing else is in it."""
        if self.folder.is_dir():
            for share in list(self.folder.glob("process_*_of_*")):
                SweepFiles(share, "").remove()
            (self.folder / _POSITION).unlink(missing_ok=True)
            self._delete_others(())
            with contextlib.suppress(OSError):  # something else is in it
                self.folder.rmdir()

    def _read_sums(self, name: str) -> list[ChannelStats]:
        path = self.folder / name
        with disposable("the pass starts anew"):
            stats, facts = read_stats(path)
            if facts.get("key") != self.key:
                raise ArtifactError(f"{path} holds sums of another pass than {_POSITION} beside it.")
        return list(stats.values())

    def _delete_others(self, names: Collection[str]) -> None:
        for pattern in ("sums_*.safetensors", "state_*.safetensors", ".*.tmp"):
            for path in list(self.folder.glob(pattern)):
                if path.name not in names:
                    path.unlink(missing_ok=True)


def _state_name(key: Key) -> str:
    return f"state_{key[0]}_{key[1]}.safetensors"


def _sums_name(stage: str | None) -> str:
    return f"sums_{stage}.safetensors"
