"""``ffnscope prune --from RUN``: what an earlier result decides, and what may be asked for anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from ffnscope.apply.record import PruningRecord, at_another_place
from ffnscope.cli import options as opt
from ffnscope.errors import UsageError
from ffnscope.run.earlier import find_record

_OF_TEXT = ("split", "mix", "num_samples", "max_length", "seed")
_DECIDED = ("method", *_OF_TEXT, "param", "core_fraction", "reference", "background")


def open_record(
    context: typer.Context, folder: Path, metric: str | None, text: opt.TextChoice, keeps: bool
) -> PruningRecord:
    """Read the record of an earlier result; its text may lie at another place now.

    Raises:
        UsageError: options that it decides already; or statistics are to be kept that are not there.
        ArtifactError: see `find_record`.
    """
    opt.refuse_useless(context, f"--from {folder}, which already decides that", _DECIDED)
    found = find_record(folder, metric)
    if keeps and found.statistics is None:
        raise UsageError(f"--keep-statistics would do nothing: {folder} has kept none with h_outer. Leave it out.")
    return at_another_place(found, text.text) if opt.given(context, "text") else found


def loading_of(context: typer.Context, loading: opt.Loading, record: PruningRecord) -> opt.Loading:
    """Load the model as it was: the commit and the dtype of the record, unless others are given."""
    known = {name: record.model.get(name) for name in ("revision", "dtype")}
    return replace(loading, **{name: v for name, v in known.items() if v is not None and not opt.given(context, name)})


def model_of(model: str | None, record: PruningRecord | None) -> str:
    """The model that is pruned; raises UsageError when none is known."""
    found = model if record is None else model or record.model.get("model_id")
    if found is None:
        raise UsageError("give MODEL, or --from RUN, the output of an earlier prune or run, which knows it.")
    return found
