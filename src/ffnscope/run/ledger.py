"""What a run folder holds: which stage made which files, from what, and how long it took."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ffnscope.errors import ArtifactError
from ffnscope.io import SCHEMA, disposable, expect_kind, hash_file, read_state, write_state
from ffnscope.run.folder import LEDGER


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
        self.inputs: dict[str, str] = {}
        path = folder / LEDGER
        if path.exists():
            with disposable("all stages run again"):
                value = read_state(path)
                expect_kind(path, value, "ledger")
                self.stages, self.inputs = value.get("stages", {}), value.get("inputs", {})
                if not (_well_formed(self.stages) and isinstance(self.inputs, dict)):
                    raise ArtifactError(f"{path} is not a complete ledger.")

    def accept(self, inputs: Mapping[str, str], *, overwrite: bool) -> list[str]:
        """Record what results are made from (name -> hash), and return the names of what has changed since it was.

        Raises:
            ArtifactError: something has changed since results were recorded, and ``overwrite`` is not set.
        """
        changed = [name for name, value in inputs.items() if self.inputs.get(name, value) != value]
        if changed and self.stages and not overwrite:
            was, now = self.inputs[changed[0]], inputs[changed[0]]
            raise ArtifactError(
                f"{self.folder} holds results of other inputs: changed since they were made: {', '.join(changed)} "
                f"(hash {was}, now {now}). Take back what was there, choose another output.dir, or pass --overwrite to "
                "make again what depends on it."
            )
        if self.inputs != inputs:
            self.inputs = dict(inputs)
            self._save()
        return changed

    def current(self, stage: str, key: str) -> bool:
        """Whether the results of a stage are present, undamaged and made from the same inputs."""
        return stage in self.stages and self.why_again(stage, key) is None

    def why_again(self, stage: str, key: str) -> str | None:
        """Why the recorded results of a stage cannot stay; None where they can, or where there are none."""
        found = self.stages.get(stage)
        if found is None:
            return None
        if found["key"] != key:
            return "what it depends on has changed (model, text, configuration or version)"
        gone = [name for name, digest in found["files"].items() if not self._intact(name, digest)]
        return f"missing or damaged: {', '.join(gone)}" if gone else None

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
        others = [name for name in self.stages if name not in stages]
        for name in others:
            self.begin(name, self._files_of(stages))

    def _files_of(self, stages: Collection[str]) -> set[Path]:
        return {self.folder / name for stage in stages for name in self.stages.get(stage, {}).get("files", {})}

    def _intact(self, name: str, digest: str) -> bool:
        path = self.folder / name
        return path.is_file() and hash_file(path) == digest

    def _save(self) -> None:
        value = {"kind": "ledger", "schema": SCHEMA, "inputs": self.inputs, "stages": self.stages}
        write_state(self.folder / LEDGER, value)


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
