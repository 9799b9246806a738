"""What a run folder holds: which stage made which files, from what, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnscope.errors import ArtifactError
from ffnscope.io import SCHEMA, expect_kind, hash_file, read_json, write_json

NAME = "ledger.json"


class Ledger:
    """The record of finished stages of one run folder.

    A stage is current when its key (a hash of everything that it depends on) is the recorded one and all its files are
    there with the recorded bytes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stages: dict[str, dict[str, Any]] = {}
        path = folder / NAME
        if path.exists():
            value = read_json(path)
            expect_kind(path, value, "ledger")
            self.stages = value["stages"]

    def current(self, stage: str, key: str) -> bool:
        """Whether the results of a stage are present, undamaged and made from the same inputs."""
        found = self.stages.get(stage)
        if found is None or found["key"] != key:
            return False
        return all(
            (self.folder / name).is_file() and hash_file(self.folder / name) == digest
            for name, digest in found["files"].items()
        )

    def record(self, stage: str, key: str, files: Sequence[Path], measured: dict[str, Any]) -> None:
        """Record a finished stage with the hashes of its files."""
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ArtifactError(f"stage {stage} did not write {', '.join(missing)} in {self.folder}.")
        names = {f.relative_to(self.folder).as_posix(): hash_file(f) for f in files}
        self.stages[stage] = {"key": key, "files": names, **measured}
        write_json(self.folder / NAME, {"kind": "ledger", "schema": SCHEMA, "stages": self.stages})
