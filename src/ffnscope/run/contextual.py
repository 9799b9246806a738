"""The stages of a run that calibrate contextual sparsity: a card, a curve around it, their plots."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import read_json
from ffnscope.report.card_table import card_sentences
from ffnscope.run.schema import RunConfig
from ffnscope.run.sparse_steps import CardJob, card_plots, draw_card_plots, write_curve
from ffnscope.run.stages import Job
from ffnscope.run.windows import second_windows
from ffnscope.saving import writing
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.evaluation import FormRow, form_row_of
from ffnscope.types import FFNSite

FOLDER = "contextual"
PART = "unfinished"
CARD, CURVE, PLOTS = "contextual card", "contextual curve", "contextual plots"


def open_card(
    config: RunConfig, loaded: LoadedModel, sites: Sequence[FFNSite], windows: Windows, model_hash: str = ""
) -> CardJob | None:
    """What the contextual block asks for, its second text read, all that can be refused refused; None without it.

    Raises:
        UsageError, NotAvailableError: see `CardJob.check`.
        TextError: the second text is too short.
    """
    asked = config.contextual
    if not asked.enabled:
        return None
    found = CardJob(
        loaded,
        sites,
        asked.rule,
        asked.card_target,
        asked.options(config.calibration.batch_size),
        windows,
        second_windows(config, loaded.tokenizer),
        asked.curves,
        config.experiment.seed,
        round(asked.max_traces * 2**30),
        model_hash,
        asked.against,
    )
    found.check()
    return found


def contextual_stage(job: Job, asked: CardJob | None) -> tuple[SparsityCard | None, list[FormRow]]:
    """Make ``contextual/card.json`` and its tensors, ``curve.csv`` and ``.json``, and their plots.

    Traces and what is found on the way lie in ``contextual/unfinished``, from which an interrupted stage goes on; the
    folder is removed at the end.
    """
    folder = job.folder / FOLDER
    part = folder / PART
    card, rows = None, list[FormRow]()
    if asked is not None:
        card = _card(job, asked, folder, part)
        rows = _curve(job, asked, card, folder, part)
        _plots(job, card, rows, folder)
    if part.exists():
        with writing(part):
            shutil.rmtree(part)
    return card, rows


def card_summary(card: SparsityCard, rows: Sequence[FormRow]) -> dict[str, Any]:
    """What a card found, for ``summary.json``."""
    return {
        "sentences": card_sentences(card),
        "target": {card.target[0]: card.target[1]},
        "bytes_share": card.bytes_read / card.bytes_dense,
        "bytes_of": UNIT,
        "dense_ffns": sum(one.dense for one in card.sites),
        "figures": {source: {k: asdict(v) for k, v in found.items()} for source, found in card.figures.items()},
        "loss": {source: asdict(one) for source, one in card.loss.items()},
        "certificate": None if card.certificate is None else card.certificate.statement,
        "curve": [row.flat() for row in rows],
    }


def _card(job: Job, asked: CardJob, folder: Path, part: Path) -> SparsityCard:
    path = folder / "card.json"
    files = [path, path.with_suffix(".safetensors")]

    def make() -> None:
        card = asked.fit(part, job.reporter)
        write_card(path, card, overwrite=True)
        for sentence in card_sentences(card):
            job.reporter.say(sentence)

    job.stage(CARD, asked.key, files, make)
    return read_card(path)


def _curve(job: Job, asked: CardJob, card: SparsityCard, folder: Path, part: Path) -> list[FormRow]:
    if not asked.densities:
        return []
    files = [folder / "curve.csv", folder / "curve.json"]

    def make() -> None:
        write_curve(asked.curve(card, part, job.reporter), files)

    job.stage(CURVE, [job.keys[CARD], sorted(asked.densities), asked.against], files, make)
    return [form_row_of(row) for row in read_json(files[1])["rows"]]


def _plots(job: Job, card: SparsityCard, rows: Sequence[FormRow], folder: Path) -> None:
    if not job.config.output.plots:
        return
    title = f"{job.config.model.model_id}, {job.calibration.source}"

    def make() -> None:
        draw_card_plots(folder, card, rows, title)

    job.stage(PLOTS, [job.keys[CARD], job.keys.get(CURVE), title], card_plots(folder, rows), make)
