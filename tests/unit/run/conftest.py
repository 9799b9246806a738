"""A tiny checkpoint, two short texts, and small configurations on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint, write_texts
from ffnscope.run import RunConfig, config_from_dict
from runs import small_run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def small(checkpoint: Path, texts: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Make the configuration of `runs.small_run`, in a folder of this test."""

    def make(**changes: Any) -> RunConfig:
        return config_from_dict(small_run(checkpoint, texts, tmp_path / "out", **changes))

    return make
