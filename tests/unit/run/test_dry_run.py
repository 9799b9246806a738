"""--dry-run as a command: what stops a run is found, and the reference model is counted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from checkpoints import make_checkpoint
from ffnscope.errors import ModelError, TextError
from ffnscope.ffn.load import load_model
from ffnscope.run import RunConfig, estimate
from ffnscope.run.choices import reference_bytes
from ffnscope.run.dry_run import dry_run


@pytest.fixture
def delta(small: Callable[..., RunConfig]) -> Callable[[str], RunConfig]:
    """A run that scores the change since a reference model."""
    return lambda before: small(model={"reference_id": before}, metrics={"enabled": ["delta_alignment"]})


def printed(config: RunConfig) -> str:
    text = io.StringIO()
    dry_run(config, Console(file=text, width=200))
    return text.getvalue()


def test_the_reference_model_is_counted_and_not_read(
    delta: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_checkpoint(tmp_path / "before", seed=1, hidden_size=64, intermediate_size=4096, num_hidden_layers=8)
    config = delta(str(before))
    expected = sum(p.numel() * p.element_size() for p in load_model(str(before)).model.parameters())
    assert reference_bytes(config) == expected
    shown = printed(config)
    assert f"the reference model {before} takes {expected / 2**30:.1f} GiB more beside the model" in shown
    assert not config.output_dir.exists()


def test_without_a_metric_that_needs_it_there_is_none(small: Callable[..., RunConfig]) -> None:
    assert reference_bytes(small()) == 0
    assert "reference" not in printed(small())


@pytest.mark.parametrize("damage", ["missing", "no weights", "no config"])
def test_a_reference_that_cannot_be_loaded_stops_at_once(
    delta: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before = tmp_path / "before"
    if damage != "missing":
        make_checkpoint(before)
        (before / ("model.safetensors" if damage == "no weights" else "config.json")).unlink()
    monkeypatch.setattr(estimate, "load_to_estimate", None)
    with pytest.raises(ModelError, match="before"):
        printed(delta(str(before)))


def test_a_missing_text_stops_at_once(small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "load_to_estimate", None)
    with pytest.raises(TextError, match=r"none\.txt does not exist"):
        printed(small(dataset={"name": "./none.txt"}))
