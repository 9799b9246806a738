"""A mixture of experts whose weights are offloaded gives what the resident one gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.apply.mask import masked
from ffnscope.apply.selfcheck import check_cut
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.collect import calibrate, weights_hash
from ffnscope.ffn.sites import find_sites
from ffnscope.scoring import score
from ffnscope.types import PruningPlan
from reference import text
from tiny import logits
from tiny_listed import tiny_listed
from tiny_moe import tiny_moe

MakePlan = Callable[..., PruningPlan]
METRICS = ("wanda", "scar_loss_proxy")


def build(name: str) -> Any:
    return tiny_listed() if name == "listed" else tiny_moe(name)


def in_memory(name: str, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(build(name), execution_device=torch.device("cpu"))


def on_disk(name: str, folder: Path) -> Any:
    from accelerate import disk_offload

    model = build(name)
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


@pytest.fixture(params=["mixtral", "gpt_oss", "qwen2_moe", "listed"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[in_memory, on_disk], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Any:
    return request.param(name, tmp_path)


def meta(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.device.type == "meta"}


def test_sites_statistics_and_scores(model: Any, name: str) -> None:
    resident, windows, empty = build(name), text(4, 12), meta(model)
    assert find_sites(model) == find_sites(resident)
    found, wanted = calibrate(model, windows, METRICS), calibrate(resident, windows, METRICS)
    for metric in METRICS:
        scores, expected = score(model, found, metric).values, score(resident, wanted, metric).values
        assert scores.keys() == expected.keys()
        assert all(torch.equal(scores[s], expected[s]) for s in expected)
    assert meta(model) == empty


@pytest.mark.filterwarnings("ignore:experts of one layer lie in one tensor")
@pytest.mark.parametrize("allocator", ["local", "global"])
def test_mask_and_slice(model: Any, name: str, random_plan: MakePlan, allocator: str) -> None:
    resident = build(name)
    plan, dense, hashed, empty = random_plan(resident, 0.5, allocator=allocator), logits(resident), *_facts(model)
    with masked(resident, plan):
        wanted = logits(resident)
    with masked(model, plan):
        assert torch.equal(logits(model), wanted)
    assert not torch.equal(wanted, dense)
    assert torch.equal(logits(model), dense)
    assert weights_hash(model) == hashed
    slice_(model, plan)
    assert torch.equal(logits(model), logits(slice_(resident, plan)))
    assert meta(model) == empty
    assert weights_hash(model) == weights_hash(resident)


def _facts(model: Any) -> tuple[str, set[str]]:
    return weights_hash(model), meta(model)


def test_the_check_before_a_cut(model: Any) -> None:
    hashed = weights_hash(model)
    assert all(c.difference < 1e-4 < c.effect for c in check_cut(model, find_sites(model)))
    assert weights_hash(model) == hashed
