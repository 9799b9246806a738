"""What a finished run left in its folder, read back for a report: no model and no text is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ffnscope.errors import ArtifactError
from ffnscope.evaluate.compare import EvalRow
from ffnscope.io import read_json, read_scores, read_tensors
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_files import read_card
from ffnscope.sparse.evaluation import FormRow, form_row_of
from ffnscope.types import EvalResult, FFNSite, Scores

SUMMARY, CONFIG, SCORES = "summary.json", "experiment_config.yaml", "scores.safetensors"
RESULTS, TASKS, SAMPLES = "pruning_results.json", "tasks.json", "samples.json"
SETS, LORENZ = "analysis/channel_sets.safetensors", "analysis/lorenz.json"
SWEEP = "sweep.json"
CARD, CARD_CURVE = "contextual/card.json", "contextual/curve.json"
TABLES = (
    "concentration",
    "core_overlap",
    "core_stability",
    "halo",
    "cross_layer",
    "ablation",
    "dose",
    "ranking_quality",
    "protection",
    "curves",
    "error_profile",
)


@dataclass(frozen=True, slots=True, eq=False)
class RunFolder:
    """A run as its files tell it.

    Attributes:
        folder: where they are.
        summary: ``summary.json``: versions, model, texts, seeds, stages.
        config: what was asked, ``experiment_config.yaml``.
        scores: metric -> scores.
        core: site -> indices of its core; empty without one.
        rows: perplexity and fidelity of the dense model and every plan.
        tasks: rows of the downstream tasks.
        samples: prompts, and texts per model; empty without.
        tables: name of an analysis -> its rows; only those that were made.
        facts: name of an analysis -> what else its file tells.
        lorenz: fractions, and curves per metric and site; empty without.
        card: the calibrated contextual sparsity, where there is one.
        card_curve: perplexity at several densities around it.
    """

    folder: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    scores: Mapping[str, Scores]
    core: Mapping[FFNSite, Tensor]
    rows: list[EvalRow]
    tasks: list[dict[str, Any]]
    samples: Mapping[str, Any]
    tables: Mapping[str, list[dict[str, Any]]]
    facts: Mapping[str, Mapping[str, Any]]
    lorenz: Mapping[str, Any]
    card: SparsityCard | None = None
    card_curve: Sequence[FormRow] = ()

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.summary.get("name", self.folder.name))

    @property
    def dense(self) -> list[EvalRow]:
        """Rows of the unpruned model, one per text."""
        return [row for row in self.rows if row.metric is None]


def read_run(folder: Path) -> RunFolder:
    """Read a run's results.

    Raises:
        ArtifactError: the folder is missing, holds no finished run or a sweep, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; expected the output folder of `ffnscope run`.")
    if (folder / SWEEP).exists():
        raise ArtifactError(
            f"{folder} holds a sweep. Its own report.html compares its cells; give the folders of cells, such as "
            f"{next((path.parent for path in sorted(folder.glob(f'*/{SUMMARY}'))), folder / 'CELL')}."
        )
    if not (folder / SUMMARY).exists():
        what = "a run that is not finished" if (folder / "ledger.json").exists() else "no run"
        cure = "run it again, and it goes on" if "not finished" in what else "give the output folder of `ffnscope run`"
        raise ArtifactError(f"{folder} holds {what} (no summary.json): {cure}.")
    scores = folder / SCORES
    found = read_scores(scores)[0] if scores.exists() else {}
    made = {name: path for name in TABLES if (path := _table(folder, name)).exists()}
    return RunFolder(
        folder,
        read_json(folder / SUMMARY),
        _config(folder / CONFIG),
        found,
        _core(folder / SETS, found),
        [_row(value) for value in _rows(folder / RESULTS)],
        _rows(folder / TASKS),
        _optional(folder / SAMPLES),
        {name: _rows(path) for name, path in made.items()},
        {name: _optional(path).get("facts", {}) for name, path in made.items()},
        _optional(folder / LORENZ),
        read_card(folder / CARD) if (folder / CARD).exists() else None,
        [form_row_of(value) for value in _rows(folder / CARD_CURVE)],
    )


def result_files(folder: Path) -> list[Path]:
    """The files of a run that `read_run` reads and that are there."""
    names = (SUMMARY, CONFIG, SCORES, SETS, RESULTS, TASKS, SAMPLES, LORENZ, CARD, CARD_CURVE)
    found = [*(folder / name for name in names), *(_table(folder, name) for name in TABLES)]
    return [path for path in found if path.exists()]


def _table(folder: Path, name: str) -> Path:
    return folder / "analysis" / f"{name}.json"


def _optional(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", read_json(path)) if path.exists() else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(_optional(path).get("rows", ()))


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    return found


def _core(path: Path, scores: Mapping[str, Scores]) -> dict[FFNSite, Tensor]:
    if not path.exists() or not scores:
        return {}
    tensors, _ = read_tensors(path)
    sites = next(iter(scores.values())).values
    return {site: tensors[f"{site.name}/core"] for site in sites if f"{site.name}/core" in tensors}


def _row(value: Mapping[str, Any]) -> EvalRow:
    units = {"perplexity": "1", "kl_to_dense": "nats/token", "top1_agreement": "fraction"}
    given: dict[str, Any] = {
        "n": value["n_tokens"] or 0,
        "dataset": value["dataset"],
        "protocol": value["protocol"] or "",
    }
    results = [
        EvalResult(name, value[name], unit, value[f"{name}_stderr"], **given)
        for name, unit in units.items()
        if value[name] is not None
    ]
    return EvalRow(
        value["label"], value["metric"], value["sparsity_asked"], value["sparsity"], value["dataset"], tuple(results)
    )


def described(value: Any) -> str:
    """A value of a configuration in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
