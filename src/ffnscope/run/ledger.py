"""What a run folder holds: which stage made which files, from what, and how long it took."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ffnscope.errors import ArtifactError
from ffnscope.io import SCHEMA, disposable, expect_kind, hash_file, read_json, write_json

NAME = "ledger.json"


class Ledger:
    """The record of finished stages of one run folder.

    A stage is current when its key (a hash of everything that it depends on) is the recorded one and all its files are
    there with the recorded bytes.

    Raises:
        ArtifactError: the file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stages: dict[str, dict[str, Any]] = {}
        path = folder / NAME
        if path.exists():
            with disposable("all stages run again"):
                value = read_json(path)
                expect_kind(path, value, "ledger")
                self.stages = value.get("stages", {})
                if not _well_formed(self.stages):
                    raise ArtifactError(f"{path} is not a complete ledger.")

    def current(self, stage: str, key: str) -> bool:
        """Whether the results of a stage are present, undamaged and made from the same inputs."""
        found = self.stages.get(stage)
        if found is None or found["key"] != key:
            return False
        return all(self._intact(name, digest) for name, digest in found["files"].items())

    @property
    def intact(self) -> bool:
        """Whether every recorded file is there with the recorded bytes."""
        return all(self._intact(*item) for row in self.stages.values() for item in row["files"].items())

    def begin(self, stage: str, files: Collection[Path] = ()) -> None:
        """Forget a stage that runs again: its damaged files are deleted, and those that are not among ``files``."""
        found = self.stages.pop(stage, None)
        if found is None:
            return
        self._save()
        for name, digest in found["files"].items():
            path = self.folder / name
            if path not in files or not self._intact(name, digest):
                path.unlink(missing_ok=True)

    def record(self, stage: str, key: str, files: Sequence[Path], measured: Mapping[str, Any]) -> None:
        """Record a finished stage with the hashes of its files."""
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ArtifactError(f"stage {stage} did not write {', '.join(missing)} in {self.folder}.")
        names = {f.relative_to(self.folder).as_posix(): hash_file(f) for f in files}
        self.stages[stage] = {"key": key, "files": names, **measured}
        self._save()

    def keep(self, stages: Collection[str]) -> None:
        """Forget the other stages, which the configuration no longer asks for, and delete their files."""
        for name in [name for name in self.stages if name not in stages]:
            self.begin(name)

    def _intact(self, name: str, digest: str) -> bool:
        path = self.folder / name
        return path.is_file() and hash_file(path) == digest

    def _save(self) -> None:
        write_json(self.folder / NAME, {"kind": "ledger", "schema": SCHEMA, "stages": self.stages})


def _well_formed(stages: Any) -> bool:
    """Whether every row has a key and files inside the folder: files outside it must never be deleted."""
    return isinstance(stages, dict) and all(
        isinstance(row, dict)
        and isinstance(row.get("key"), str)
        and isinstance(row.get("files"), dict)
        and all(isinstance(digest, str) and _inside(name) for name, digest in row["files"].items())
        for row in stages.values()
    )


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
