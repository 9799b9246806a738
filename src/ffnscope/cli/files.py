"""Files that several commands read or write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.io import read_scores, write_csv, write_json
from ffnscope.types import Scores

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Out = Annotated[Path, typer.Option("--out", help="Output; must not exist, unless --overwrite.")]


def check_output(path: Path, overwrite: bool) -> None:
    """Raise ArtifactError when an output exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} already exists. Choose another --out, or pass --overwrite to replace it.")


def check_table(path: Path | None, overwrite: bool) -> None:
    """Raise UsageError or ArtifactError unless `write_table` can write there; None is no table."""
    if path is None:
        return
    if path.suffix not in (".csv", ".json"):
        raise UsageError(f"--out {path} must end in .csv or .json.")
    check_output(path, overwrite)


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
