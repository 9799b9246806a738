"""Targets x policies x predictors of the contextual block: every combination ends with a card that keeps its word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from checkpoints import write_documents
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.io import write_plan
from ffnscope.plan.build import Budget
from ffnscope.run import RunConfig, config_from_dict
from ffnscope.run.contextual import open_card
from ffnscope.run.progress import Reporter
from ffnscope.run.windows import calibration_windows
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.masking import masked_by
from ffnscope.types import PruningPlan
from tiny import tokens

TARGETS = {"recall": 0.9, "missed_mass": 0.2, "density": 0.5, "relative_error": 0.4, "perplexity": 0.1}
POLICIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("top_k", "threshold", "channel_threshold", "nucleus", "statistical_top_k")},
    "capped_threshold": {"k_min": 2, "k_max": 48},
    "bank_top_k": {"size": 16},
    "hybrid": {"core": 0.05, "rest": "threshold"},
}
TRAINED = {"rank": 4, "epochs": 1}
PREDICTORS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("oracle", "exact_gate", "exact_up", "random", "sign_bit", "static")},
    "deja_vu": TRAINED,
    "griffin": {"prompt": 6},
    "low_bit": {"bits": 3, "group": 8},
    "low_rank": {**TRAINED, "lookahead": 1},
    "whitened_svd": {"rank": 4},
}


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(ModelSource(str(checkpoint), device="cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and what is kept between the cards of this file: traces are made once."""
    return write_documents(tmp_path_factory.mktemp("product"))


def config(checkpoint: Path, folder: Path, **contextual: Any) -> RunConfig:
    return config_from_dict(
        {
            "experiment": {"device": "cpu"},
            "model": {"model_id": str(checkpoint)},
            "dataset": {"name": str(folder / "train.jsonl"), "batch_size": 4},
            "calibration": {"num_samples": 12, "max_length": 24},
            "metrics": {"scar": {"enabled": False}},
            "contextual": {"enabled": True, **contextual},
            "evaluation": {"name": str(folder / "test.jsonl"), "samples": {"enabled": False}},
            "output": {"dir": str(folder / "out"), "plots": False, "report": False},
        }
    )


def card_of(asked: RunConfig, loaded: LoadedModel, folder: Path) -> SparsityCard:
    """The card of a configuration, written and read."""
    windows = calibration_windows(asked, loaded.tokenizer)
    job = open_card(asked, loaded, find_sites(loaded.model), windows)
    assert job is not None
    write_card(folder / "card.json", job.fit(folder, Reporter(Console(quiet=True))), overwrite=True)
    return read_card(folder / "card.json")


def keeps_its_word(card: SparsityCard, measure: str, value: float) -> bool:
    if measure == "perplexity":
        change = card.loss["calibrate"]
        return change.sparse <= change.dense * (1 + value) * (1 + 1e-6)
    found = card.figures["calibrate"][measure].mean
    return found >= value - 1e-9 if measure == "recall" else found <= value + 1e-9


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("measure", sorted(TARGETS))
def test_every_target_by_every_policy(
    loaded: LoadedModel, checkpoint: Path, folder: Path, measure: str, policy: str
) -> None:
    asked = config(
        checkpoint,
        folder,
        target=f"{measure}={TARGETS[measure]}",
        policy=policy,
        policy_params=POLICIES[policy],
        predictor_params={"group": 8},
    )
    card = card_of(asked, loaded, folder)
    assert (card.target, card.rule.policy) == ((measure, TARGETS[measure]), policy)
    assert keeps_its_word(card, measure, TARGETS[measure])
    assert set(card.figures) == set(card.loss) == {"calibrate", "test"}
    if selectors := card.selectors(loaded.model):
        with masked_by(loaded.model, selectors):
            loaded.model(input_ids=tokens()[:1], use_cache=False)


@pytest.mark.parametrize("predictor", sorted(PREDICTORS))
def test_every_predictor(loaded: LoadedModel, checkpoint: Path, folder: Path, predictor: str) -> None:
    asked = config(
        checkpoint,
        folder,
        target="density=0.4",
        policy="top_k",
        predictor=predictor,
        predictor_params=PREDICTORS[predictor],
    )
    card = card_of(asked, loaded, folder)
    assert card.rule.predictor == predictor and keeps_its_word(card, "density", 0.4)
    sparse = [row for row in card.sites if not row.dense]
    assert [site.name for site in card.selectors(loaded.model)] == [row.site.name for row in sparse]
    assert sparse or predictor in ("oracle",)  # which reads gate and up in full


def test_a_plan_of_pruning(loaded: LoadedModel, checkpoint: Path, folder: Path) -> None:
    import torch

    sites = find_sites(loaded.model)
    plan = PruningPlan({site: torch.arange(10) for site in sites}, "wanda", "local", Budget(0.8))
    write_plan(folder / "plan.json", plan)
    params = {"plan": str(folder / "plan.json")}
    asked = config(
        checkpoint, folder, target="parameter=1", policy="threshold", predictor="static", predictor_params=params
    )
    card = card_of(asked, loaded, folder)
    assert [row.density for row in card.sites] == pytest.approx([10 / site.d_ff for site in sites])
