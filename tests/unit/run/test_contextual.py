"""Runs that calibrate contextual sparsity: files, the report, resuming, what is refused, the dry run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ffnscope
from checkpoints import write_documents
from faults import stop_at
from ffnscope.errors import ConfigError, UsageError
from ffnscope.run import RunConfig, config_from_dict, dump_config, sparse_steps
from ffnscope.run.dry_run import dry_run
from ffnscope.run.progress import Reporter
from ffnscope.sparse import card_curve, fit
from ffnscope.sparse.evaluation import DENSE
from ffnscope.sparse.rivals import USUAL
from ffnscope.sparse.tracing import TraceOptions
from reference import text as windows_of_text
from runs import merged, quiet_run, results, strict_json
from tiny import LAYERS

ASKED: dict[str, Any] = {
    "enabled": True,
    "target": "density=0.5",
    "predictor_params": {"group": 8},
    "policy": "top_k",
    "curves": [0.5],
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def asked(checkpoint: Path, documents: Path, tmp_path: Path) -> dict[str, Any]:
    """Nothing but a card, on a text of several documents, and another one as the second."""
    return {
        "experiment": {"device": "cpu"},
        "model": {"model_id": str(checkpoint)},
        "dataset": {"name": str(documents / "train.jsonl"), "batch_size": 4},
        "calibration": {"num_samples": 12, "max_length": 24},
        "metrics": {"scar": {"enabled": False}},
        "contextual": ASKED,
        "evaluation": {
            "name": str(documents / "test.jsonl"),
            "num_samples": 6,
            "extra": [{"name": str(documents / "second.jsonl")}],
            "samples": {"enabled": False},
        },
        "output": {"dir": str(tmp_path / "out"), "plots": False, "report": False},
    }


def made(base: dict[str, Any], **changes: Any) -> RunConfig:
    return config_from_dict(merged(base, changes))


def test_a_card_with_its_curve_and_report(asked: dict[str, Any]) -> None:
    found = quiet_run(made(asked, output={"plots": True, "report": True}))
    folder = found.folder / "contextual"
    names = ("card.json", "card.safetensors", "card.png", "curve.csv", "curve.json", "curve.png", "curve_bytes.png")
    assert {path.name for path in folder.iterdir()} == {*names}
    card = ffnscope.read_card(folder / "card.json")
    assert found.card is not None and found.card.bytes_read == card.bytes_read and len(card.sites) == LAYERS
    assert set(card.figures) == set(card.loss) == {"calibrate", "test", "second"}
    assert card.figures["calibrate"]["density"].mean <= 0.5
    assert "second.jsonl" in card.facts["second"]["source"]
    labels = [row.label for row in found.card_curve]
    assert labels[0] == DENSE and labels[1:5] == ["low_bit, top_k", *USUAL]
    own = next(row for row in found.card_curve if row.label == "low_bit, top_k")
    assert own.density == pytest.approx(0.5) and own.difference is not None
    assert labels[5:] == ["the card"] and found.card_curve[5].density == pytest.approx(0.5)
    assert found.card_curve[0].perplexity.value == pytest.approx(card.loss["test"].dense)
    told = strict_json(found.folder / "summary.json")["contextual"]
    assert told["target"] == {"density": 0.5} and len(told["curve"]) == len(labels)
    assert {"contextual card", "contextual curve", "contextual plots"} <= set(
        strict_json(found.folder / "summary.json")["stages"]
    )
    page = (found.folder / "report.html").read_text()
    assert "Contextual sparsity" in page and "Asked: density 0.5, by top_k of the scores of low_bit" in page
    assert "Selections by layer" in page and "Rise of the perplexity over dense" in page
    assert "Perplexity at several densities" in page and "static mean" in page


def test_an_interrupted_run_goes_on_and_only_what_changed_is_done_again(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = quiet_run(made(asked, output={"dir": str(tmp_path / "unbroken")}))
    config = made(asked)
    unfinished = tmp_path / "out" / "contextual" / "unfinished"
    with monkeypatch.context() as patch:
        stop_at(patch, fit, "fit_site", 2)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(config)
    assert len(list((unfinished / "fits").iterdir())) == 1 and list(unfinished.glob("traces_*"))
    with monkeypatch.context() as patch:
        fits = stop_at(patch, fit, "fit_site", 0)
        stop_at(patch, card_curve, "form_losses", 3)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(config)
    assert len(fits) == LAYERS - 1 and (unfinished / "curve.json").exists()
    with monkeypatch.context() as patch:
        fits = stop_at(patch, fit, "fit_site", 0)
        measured = stop_at(patch, card_curve, "form_losses", 0)
        found = quiet_run(config)
        assert not fits and len(measured) == len(found.card_curve) - 2
        assert not unfinished.exists()
        assert results(found.folder) == results(unbroken.folder)
        measured.clear()
        quiet_run(made(asked, contextual={"curves": []}, output={"plots": True}), overwrite=True)
        assert not fits and not measured
    kept = {path.name for path in (found.folder / "contextual").iterdir()}
    assert kept == {"card.json", "card.safetensors", "card.png"}


def test_it_is_off_unless_enabled(asked: dict[str, Any]) -> None:
    del asked["contextual"]
    config = config_from_dict(asked)
    assert not config.contextual.enabled and config.contextual_text is None


def test_the_second_text(asked: dict[str, Any]) -> None:
    config = made(asked)
    assert config.contextual.second is not None
    assert config.contextual.second.name == config.evaluation.extra[0].name
    assert dump_config(config_from_dict(config.model_dump())) == dump_config(config)
    other = made(asked, contextual={"second": {"name": "stdlib_source", "split": "train"}})
    assert other.contextual_text is not None and other.contextual_text.words == "stdlib_source train"
    shipped = made(asked, evaluation={"extra": [{"name": "pydoc_topics"}]}).contextual_text
    assert shipped is not None and shipped.words == "pydoc_topics test"
    assert made(asked, evaluation={"extra": []}).contextual_text is None


def problems(asked: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(asked)
    return caught.value.problems


def test_all_errors_come_at_once(asked: dict[str, Any]) -> None:
    block = {
        "enabled": True,
        "target": "recal=0.9",
        "policy": "topk",
        "predictor_params": {"bit": 3},
        "certify": "riskcontrol",
        "curves": [0.3, 30],
        "second": {"name": asked["dataset"]["name"]},
        "dencity": 0.1,
    }
    found = problems({**asked, "contextual": block})
    expected = (
        "contextual.target: Unknown target 'recal'. Did you mean 'recall'?",
        "contextual.policy: unknown policy 'topk'. Did you mean 'top_k'?",
        "contextual.predictor_params: Unknown parameter of predictor 'low_bit' 'bit'",
        "contextual.certify: expected 'risk_control', 'split_conformal' or 'learn_then_test'; got 'riskcontrol'",
        "contextual.curves[1]: must be in (0, 1)",
        "is the same as that of the calibration. Give another",
        "contextual.dencity: unknown key 'dencity'",
    )
    for text in expected:
        assert sum(text in line for line in found) == 1, (text, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enabled": False}, "contextual.target: would do nothing without 'enabled: true'"),
        ({"target": "recall"}, "is not MEASURE=VALUE, for example recall=0.95"),
        ({"target": "recall=95"}, "target recall must be in [0, 1]; got 95"),
        ({"predictor": "griffin", "predictor_params": {"prompt": 0}}, "griffin takes its scores from a prompt"),
        ({"predictor": "low_rank", "predictor_params": {"lookahead": 2}}, "lookahead must be 0 or 1 layers; got 2"),
        ({"predictor": "low_rank", "predictor_params": {"loss": "hinge"}}, "Unknown loss 'hinge'"),
        ({"predictor": "static", "predictor_params": {"plan": 3}}, "plan of predictor 'static' must be str or None"),
        ({"floor": 0.2}, "contextual.floor: would do nothing with 'allocation: uniform'"),
        ({"target": "parameter=5", "allocation": "measured"}, "a given parameter of the policy is taken as it is"),
        ({"predictor_params": {"bits": "four"}}, "bits of predictor 'low_bit' must be int; got 'four'"),
        ({"failure": 0.2}, "contextual.failure: would do nothing with 'certify: null'"),
        ({"certify": "risk_control"}, "contextual.certify: a density is a cost and has no certificate"),
        ({"target": "recall=0.9", "allocation": "fisher"}, "contextual.allocation: a target recall fixes"),
        ({"policy": "hybrid", "policy_params": {"core": 0.6}}, "contextual.curves: hybrid always keeps 0.6"),
        (
            {"policy": "hybrid", "policy_params": {"core": "x"}},
            "the .json file of a pruning plan; got 'x'",
        ),
    ],
)
def test_refused(asked: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    found = problems({**asked, "contextual": {**ASKED, **changes}})
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {"num_samples": 2}}, "needs at least 3 documents"),
        (
            {"contextual": {"target": "recall=0.99", "certify": "risk_control", "curves": []}},
            "documents",
        ),
    ],
)
def test_too_few_documents_are_refused_before_any_work(
    asked: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quiet_run(made(asked, **changes))
    assert not (tmp_path / "out" / "statistics.safetensors").exists()


def test_the_dry_run_tells_steps(asked: dict[str, Any], tmp_path: Path) -> None:
    console = Console(record=True, width=300)
    dry_run(made(asked), console)
    told = console.export_text()
    assert "contextual trace" in told and "288 tokens" in told and "144 tokens of a second text" in told
    assert f"low_bit and calibrate top_k to density 0.5 in {LAYERS} FFNs" in told
    assert "6 models x 48 tokens: 1 densities" in told
    assert not (tmp_path / "out").exists()


def test_traces_are_checked_once_as_long_as_they_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, windows, read = ffnscope.load_model(str(checkpoint)), windows_of_text(6), list[Path]()
    monkeypatch.setattr(sparse_steps, "read_tensors", read.append)

    def traced() -> list[Path]:
        found = sparse_steps.traced(loaded, windows, tmp_path / "t", "the text", Reporter(), TraceOptions())
        return list(found.files.values())

    files = traced()
    assert not read and traced() == traced() == read == files
    entry = files[0].stat()
    os.utime(files[0], ns=(entry.st_atime_ns, entry.st_mtime_ns + 1))
    traced()
    assert read == [*files, files[0]]
