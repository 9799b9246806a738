"""Sums and scores of a repeat that is not finished, in a folder, so that an interrupted command goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ffnscope.analyze.group_sums import GroupSums, Stats
from ffnscope.io import read_scores, read_stats, write_scores, write_stats
from ffnscope.types import Scores


class RepeatFiles:
    """Saves and restores what is done of one repeat.

    Args:
        folder: of this repeat alone; None = nothing is saved.
        key: hash of everything that the repeat depends on. Files with another key are ignored and overwritten.
    """

    def __init__(self, folder: Path | None, key: str):
        self.folder = folder
        self.key = key

    def sums(self, name: str) -> GroupSums:
        """Sums of the pass ``name`` over the groups that are done; empty at first.

        Raises:
            ArtifactError: a file is damaged.
        """
        total, facts = self._stats(f"{name}.safetensors")
        groups = [self._stats(f"{name}_{i}.safetensors")[0] for i in range(facts.get("n_groups", 0))]
        known = [group for group in groups if group is not None]
        return GroupSums(known, total) if total is not None and len(known) == len(groups) else GroupSums()

    def save_sums(self, name: str, sums: GroupSums) -> None:
        """Save the sums of a pass; those of the groups come first, so that the total tells which are there."""
        if self.folder is None or sums.total is None:
            return
        for i, group in enumerate(sums.groups):
            write_stats(self.folder / f"{name}_{i}.safetensors", group.values(), {"key": self.key})
        facts = {"key": self.key, "n_groups": len(sums.groups)}
        write_stats(self.folder / f"{name}.safetensors", sums.total.values(), facts)

    def drop_sums(self) -> None:
        """Delete the sums: every score table is there."""
        if self.folder is not None:
            for path in self.folder.glob("*.safetensors"):
                if not path.name.startswith(_TABLE):
                    path.unlink()

    def tables(self) -> list[dict[str, Scores]]:
        """Score tables that are done: of the whole text, then without each group in order."""
        found: list[dict[str, Scores]] = []
        while self.folder is not None and (path := self._table(len(found))).exists():
            scores, facts = read_scores(path)
            if facts.get("key") != self.key:
                break
            found.append(scores)
        return found

    def save_table(self, index: int, scores: Mapping[str, Scores]) -> None:
        """Save a score table: 0 of the whole text, i + 1 without group i."""
        if self.folder is not None:
            write_scores(self._table(index), scores.values(), {"key": self.key})

    def _table(self, index: int) -> Path:
        assert self.folder is not None, "only called with a folder"
        return self.folder / f"{_TABLE}{index}.safetensors"

    def _stats(self, name: str) -> tuple[Stats | None, Mapping[str, Any]]:
        if self.folder is None or not (self.folder / name).exists():
            return None, {}
        stats, facts = read_stats(self.folder / name)
        return (stats, facts) if facts.get("key") == self.key else (None, {})


_TABLE = "scores_"
