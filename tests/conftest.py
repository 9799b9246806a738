"""Shared settings and fixtures. Builders of tiny models are in `tiny`."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "HF_MODULES_CACHE" not in os.environ:  # modeling files that lie beside weights are copied there
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="ffnscope-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils import logging

from ffnscope.calibrate.collect import PassOptions
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import FFNSite, PruningPlan
from tiny import tiny

logging.disable_progress_bar()
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models, which run faster so; all of them for the real one."""
    torch.set_num_threads(THREADS if request.node.get_closest_marker("model") else 1)


@pytest.fixture
def llama() -> Any:
    """A tiny Llama of two layers."""
    return tiny("llama")


@pytest.fixture
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory to spare the pass of what needs the core, unless it is asked for."""
    given = {**{f.name: f.default for f in dataclasses.fields(PassOptions)}, "one_pass_bytes": 0}
    monkeypatch.setattr(PassOptions.__init__, "__defaults__", tuple(given.values()))
    assert PassOptions().one_pass_bytes == 0


@pytest.fixture
def site() -> FFNSite:
    """A site that belongs to no model."""
    return FFNSite(0, "layers.0.mlp", "gate_proj", "up_proj", "down_proj", 4, 6, "silu")


@pytest.fixture
def random_plan() -> Callable[..., PruningPlan]:
    """Make a plan that keeps random channels of a model."""

    def make(model: Any, sparsity: float = 0.25, seed: int = 0, allocator: str = "local") -> PruningPlan:
        return build_plan(score(model, find_sites(model), "random", seed=seed), sparsity, allocator)

    return make
