"""Files that several commands read or write."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnscope.apply.folder import held, refuse_existing, sweep
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.evaluate.progress import DENSE
from ffnscope.io import read_plan, read_scores, read_state, write_csv, write_json, write_state
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import discard_damaged
from ffnscope.saving import check_writable, writing
from ffnscope.types import PruningPlan, Scores
from ffnscope.unchanged import Stamp, stamp

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
INPUTS = "inputs.json"
"""In a working folder: hashes of what the call was made with."""
Out = Annotated[Path, typer.Option("--out", help="Output; must not exist, unless --overwrite.")]


def check_output(path: Path, overwrite: bool) -> None:
    """Raise ArtifactError when an output exists and may not be replaced, or when its folder cannot be written."""
    refuse_existing(path, overwrite, "--out")
    for folder in (path.parent, path) if path.is_dir() else (path.parent,):
        check_writable(folder)


def check_folder_output(out: Path, overwrite: bool, unfinished_name: str) -> None:
    """Raise ArtifactError unless the output is new, empty, not finished, or may be replaced."""
    if out.is_file():
        raise ArtifactError(f"{out} is a file; --out must be a folder.")
    goes_on = out.is_dir() and ((out / unfinished_name).is_dir() or not any(out.iterdir()))
    check_output(out, overwrite or goes_on)


@contextlib.contextmanager
def working_folder(part: Path, stays: Callable[[], bool] = lambda: False) -> Generator[Path]:
    """Yield a folder for what has been found, from which the same call goes on; remove it at the end.

    After an interrupt or error it stays, unless nothing was found yet. No other process works in it meanwhile.

    Args:
        part: the folder.
        stays: asked after an interrupt or error, whether it stays although nothing lies in it.

    Raises:
        ArtifactError: another process is at work in it, or it cannot be written.
    """
    with writing(part):
        part.mkdir(parents=True, exist_ok=True)
    with held(part):
        sweep(part)
        try:
            yield part
        except BaseException:
            with contextlib.suppress(OSError):  # not empty
                if not stays():
                    if [path.name for path in part.iterdir()] == [INPUTS]:
                        (part / INPUTS).unlink()
                    part.rmdir()
            raise
        with writing(part):
            shutil.rmtree(part)


def tell_changes(part: Path, found: Mapping[str, str], reporter: Reporter) -> None:
    """Say which inputs (name -> hash) differ from those of the interrupted call that left a folder; remember them."""
    path = part / INPUTS
    discard_damaged(reporter, path, read_state)
    known = read_state(path) if path.exists() else {}
    changed = [name for name, value in found.items() if known.get(name, value) != value]
    if changed:
        reporter.say(f"changed since the interrupted call: {', '.join(changed)}; what depends on that is made again")
    write_state(path, {**known, **found})


@contextlib.contextmanager
def unfinished(part: Path) -> Generator[Path]:
    """A `working_folder` in an output, which marks it as not finished; a new output in which nothing is goes too.

    After an interrupt or error it also stays where the output has only some of its files: those that were written, or
    that an earlier call had left. A finished output, of which nothing is replaced yet, is still finished.
    Files of the output that a killed process had only half written are deleted.
    """
    out = part.parent
    was_unfinished, before = part.is_dir(), _files_beside(part)

    def is_incomplete() -> bool:
        found = _files_beside(part)
        return bool(found) and (was_unfinished or found != before)

    try:
        with working_folder(part, is_incomplete):
            sweep(out)
            before = _files_beside(part)
            yield part
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            out.rmdir()
        raise


def _files_beside(part: Path) -> dict[Path, Stamp | None]:
    """What lies in an output beside its working folder."""
    found = (path for path in part.parent.rglob("*") if path.is_file() and part not in path.parents)
    return {path: stamp(path) for path in found}


def check_table(path: Path | None, overwrite: bool) -> None:
    """Raise UsageError or ArtifactError unless `write_table` can write there; None is no table."""
    if path is None:
        return
    if path.suffix not in (".csv", ".json"):
        raise UsageError(f"--out {path} must end in .csv or .json.")
    check_output(path, overwrite)


def read_plans(files: Sequence[Path]) -> dict[str, PruningPlan]:
    """Plans by label: the name of the file, after as many of its folders as tell it from the others.

    Raises:
        UsageError: one file is given twice, or holds no possible plan.
        ArtifactError: a file is missing, damaged or of another kind.
    """
    paths = [file.resolve() for file in files]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UsageError(f"--plan {files[i]} is given twice; name each plan once.")
    return {_label(path, paths): read_plan(file) for file, path in zip(files, paths, strict=True)}


def _label(path: Path, paths: Sequence[Path]) -> str:
    parts = path.with_suffix("").parts
    for n in range(1, len(parts)):
        same = [other for other in paths if other.with_suffix("").parts[-n:] == parts[-n:]]
        if same == [path] and parts[-n:] != (DENSE,):
            return "/".join(parts[-n:])
    return str(path)  # another suffix is all that differs


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Write rows as CSV, or as JSON with ``facts`` beside them."""
    write_json(path, {**facts, "rows": rows}) if path.suffix == ".json" else write_csv(path, rows)


def read_metric(path: Path, metric: str) -> tuple[Scores, str]:
    """Scores of one metric of a file, and the hash of the weights that they were made from.

    Raises:
        UsageError: the file holds other metrics.
        ArtifactError: it is missing, damaged or of another kind.
    """
    found, facts = read_scores(path)
    if metric not in found:
        raise UsageError(f"{path} holds scores of {', '.join(found)}; {metric!r} is not among them.")
    return found[metric], str(facts.get("model"))
