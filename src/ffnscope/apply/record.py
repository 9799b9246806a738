"""What a pruning keeps beside its result, and another cut from it: no calibration, no pass, no backward."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.held_out import FitStatistics
from ffnscope.apply.method import Method, reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.refit import DAMPING
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.pack import Mode
from ffnscope.calibrate.text import TextSource, load_windows
from ffnscope.calibrate.tokens import Tokenizer
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, TextError, UsageError
from ffnscope.io import complete, read_facts, read_scores, read_stats, write_scores
from ffnscope.plan.build import build_plan
from ffnscope.saving import replacing
from ffnscope.types import Budget, FFNSite, Scores

FOLDER = "ffnscope"
"""Folder of a record in a checkpoint; loaders that read every safetensors file of a checkpoint do not look into it."""
SCORES = "scores.safetensors"
STATISTICS = "statistics.safetensors"
HELD_OUT = "held_out.safetensors"
"""Statistics of held-out windows, which choose the damping of one-shot reconstructions."""
KEY = "pruning"


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """How calibration windows were cut, so that they can be cut again; see `load_windows`.

    Attributes:
        source: which text.
        n: windows; None = all.
        length: tokens per window.
        seed: chooses the windows.
        hash: of the windows (`Windows.hash`).
        mode: how documents become windows.
        answers_only: of chats, only answers are predicted.
    """

    source: TextSource
    n: int | None
    length: int
    seed: int
    hash: str
    mode: Mode = "contiguous"
    answers_only: bool = False

    def windows(self, tokenizer: Tokenizer) -> Windows:
        """Cut the windows again.

        Raises:
            TextError: the text is not found or not readable, or other windows came out.
        """
        given: Any = {"n": self.n, "length": self.length, "seed": self.seed}
        try:
            found = load_windows(self.source, tokenizer, **given, mode=self.mode, answers_only=self.answers_only)
        except TextError as error:
            raise TextError(
                f"{error} It was calibrated on; if it lies at another place now, give that (--text)."
            ) from error
        self.check(found)
        return found

    def check(self, windows: Windows) -> None:
        """Raise TextError unless these are the windows of the calibration."""
        if windows.hash != self.hash:
            raise TextError(
                f"{windows.source} gives other windows (hash {windows.hash}) than those that were calibrated on "
                f"({self.hash}): the text or the tokenizer has changed. Give the same text, or calibrate again."
            )


@dataclass(frozen=True, slots=True, eq=False)
class PruningRecord:
    """What ranked the channels, and on which text: all that another cut of the same model needs.

    Attributes:
        origin: where it was read, for messages.
        scores: of the metric, with their facts; the order of removal of every FFN.
        method: the parts that pruned.
        budget: how much was removed; of a run with several sparsities the first.
        model: "hash" of the weights, "model_id", "revision", "dtype".
        batch_size: windows per forward.
        text: of the calibration; None where none was read.
        held_out: "n", "length" and "seed" of the windows that the result was measured on, and where that is known
            "source", the text (as ``asdict`` tells it).
        protected: channels that stay whatever their score.
        statistics: file with those of the calibration; None where they were not kept.
        held_out_statistics: file with those of its held-out windows; None where there are none, so that another
            one-shot reconstruction has a fixed damping.
    """

    origin: str
    scores: Scores
    method: Method
    budget: Budget
    model: Mapping[str, str | None]
    batch_size: int
    text: TextRecipe | None
    held_out: Mapping[str, Any] = field(default_factory=dict[str, Any])
    protected: Mapping[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])
    statistics: Path | None = None
    held_out_statistics: Path | None = None

    def check_method(self, method: Method) -> None:
        """Raise UsageError when a method needs what is not here."""
        if method.metric != self.scores.metric:
            raise UsageError(f"{self.origin} holds scores of {self.scores.metric!r}, not of {method.metric!r}.")
        if method.rounds > 1:
            raise UsageError(
                f"{self.origin} holds the scores of the dense model only, and {method.rounds} rounds also rank what "
                "others have left. Cut again in 1 round (--rounds 1), or prune the model anew."
            )
        if method.reconstruct == "one_shot" and self.statistics is None:
            raise UsageError(
                f"{self.origin} holds no statistics with h_outer, which a one-shot reconstruction reads. Prune again "
                "with --keep-statistics (a YAML run keeps them where pruning.reconstruct is one_shot), or choose the "
                "reconstruction 'sequential', which reads the text."
            )
        if method.reconstruct == "sequential" and self.text is None:
            raise UsageError(
                f"{self.origin} was made without a text, which a sequential reconstruction needs. Prune the model with "
                "it instead, or choose the reconstruction 'none'."
            )

    def check_model(self, model_hash: str) -> None:
        """Raise UsageError unless this is the hash of the weights that were scored."""
        if model_hash != self.model.get("hash"):
            raise UsageError(
                f"{self.origin} was made from other weights than these (or in another dtype): hash "
                f"{self.model.get('hash')}, found {model_hash}. Give the model that was pruned "
                f"({self.model.get('model_id')}), in its dtype ({self.model.get('dtype')})."
            )

    def stats(self) -> FitStatistics | None:
        """Read the statistics, if they were kept."""
        if self.statistics is None:
            return None
        held_out = None if self.held_out_statistics is None else read_stats(self.held_out_statistics)[0]
        return FitStatistics(read_stats(self.statistics)[0], held_out)

    def missing(self, method: Method) -> str | None:
        """Say what a method would read, and does without where it is not here; None where nothing is missing."""
        if not method.holds_out or self.held_out_statistics is not None:
            return None
        return (
            f"{self.origin} holds no statistics of held-out windows, which choose the damping: it is {DAMPING:g} for "
            "every FFN, and none keeps its old columns."
        )


def recut(
    model: nn.Module,
    record: PruningRecord,
    budget: Budget | float,
    *,
    method: Method | None = None,
    windows: Windows | None = None,
    options: SequentialOptions | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Cut a model that was pruned before to another budget, or by another allocator or reconstruction.

    The scores are read, so nothing is calibrated: a one-shot reconstruction reads the statistics that were kept, a
    sequential one the text. The result is that of `plan_and_reconstruct` with the same arguments, but where no
    statistics of held-out windows were kept: a one-shot reconstruction then has a fixed damping.

    Args:
        model: the dense model that was pruned; left as it was.
        record: see `read_record`, or `ffnscope.run.find_record` for the folder of a run.
        budget: how much to remove; a number is a sparsity.
        method: None for the recorded one; the metric must be that of the record.
        windows: calibration text of a sequential reconstruction: ``record.text.windows(tokenizer)``.
        options: batches and checkpoint of a sequential reconstruction.
        on_block: called with (blocks done, blocks in all) of a sequential reconstruction.

    Raises:
        UsageError: other weights, another metric, an impossible budget, or what the method needs is not there.
        TextError: other windows.
        NotAvailableError, NonFiniteError, DeviceError, ArtifactError: see `reconstruct_plan`.

    Warns:
        UserWarning: no statistics of held-out windows are there to choose the damping.
    """
    method = record.method if method is None else method
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    method.check_budget(budget)
    record.check_method(method)
    known = weights_hash(model)
    record.check_model(known)
    if windows is not None and record.text is not None:
        record.text.check(windows)
    plan = build_plan(record.scores, budget, method.allocator, protected=record.protected)
    missing = record.missing(method)
    if missing is not None:
        warnings.warn(missing, stacklevel=2)
    stats = record.stats() if method.statistics else None
    options = replace(options or SequentialOptions(batch_size=record.batch_size), model_hash=known)
    return reconstruct_plan(model, plan, method, windows=windows, stats=stats, options=options, on_block=on_block)


def write_record(folder: Path, record: PruningRecord) -> None:
    """Write a record into the folder of a pruned checkpoint, with a copy of its statistics where it has some.

    Raises:
        ArtifactError: it cannot be written.
    """
    told = {
        "method": asdict(record.method),
        "budget": asdict(record.budget),
        "model": dict(record.model),
        "batch_size": record.batch_size,
        "text": None if record.text is None else asdict(record.text),
        "held_out": dict(record.held_out),
        "protected": {site.name: index.tolist() for site, index in record.protected.items()},
    }
    facts = {"model": record.model.get("hash")}
    for name, path in ((STATISTICS, record.statistics), (HELD_OUT, record.held_out_statistics)):
        if path is not None:
            with replacing(folder / FOLDER / name) as part:
                shutil.copyfile(path, part)
    write_scores(folder / FOLDER / SCORES, [record.scores], {**facts, KEY: told})


def has_record(folder: Path) -> bool:
    """Whether a pruned checkpoint holds a record."""
    return (folder / FOLDER / SCORES).is_file()


def read_record(folder: Path) -> PruningRecord:
    """Read what `ffnscope prune` kept in the folder of a checkpoint.

    Raises:
        ArtifactError: there is no record, or it is damaged.
    """
    path = folder / FOLDER / SCORES
    if not path.is_file():
        raise ArtifactError(
            f"{folder} holds no {FOLDER}/{SCORES}: it is not what `ffnscope prune` wrote, was pruned by --plan, or by "
            "a version that kept no scores. Prune the model again."
        )
    found, facts = read_scores(path)
    with complete(path, KEY):
        told = dict(facts[KEY])
        (scores,) = found.values()
        text, protected = told["text"], told["protected"]
        return PruningRecord(
            str(folder),
            scores,
            Method(**told["method"]),
            Budget(**told["budget"]),
            told["model"],
            told["batch_size"],
            None if text is None else TextRecipe(text_source(**text.pop("source")), **text),
            told["held_out"],
            {site: torch.tensor(protected[site.name]) for site in scores.values if site.name in protected},
            with_h_outer(folder / FOLDER / STATISTICS),
            with_h_outer(folder / FOLDER / HELD_OUT),
        )


def text_source(*, mix: Sequence[Mapping[str, Any]] = (), **told: Any) -> TextSource:
    """A text from what ``asdict`` told of it."""
    parts = tuple(text_source(**one) for one in mix)
    return TextSource(**told, mix=parts)


def with_h_outer(path: Path) -> Path | None:
    """The path of statistics, if they are there and one-shot reconstructions can read them."""
    if not path.is_file():
        return None
    sites = read_facts(path).get("sites", [])
    return path if sites and all("h_outer" in row["counts"] for row in sites) else None


def at_another_place(record: PruningRecord, name: str) -> PruningRecord:
    """The same record, whose text is now found under another name; its windows are still checked."""
    if record.text is None:
        return record
    return replace(record, text=replace(record.text, source=replace(record.text.source, name=name)))
