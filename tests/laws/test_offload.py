"""An offloaded model, in memory or on disk, gives what the resident one gives: statistics, scores, logits, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.one_shot import reconstruct
from ffnscope.apply.reconstruction import reconstruct_
from ffnscope.apply.sequential import reconstruct_sequential
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.capture import capture
from ffnscope.calibrate.collect import calibrate, collect, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.compare import compare_plans
from ffnscope.evaluate.progress import fingerprint
from ffnscope.ffn.sites import find_sites
from ffnscope.scoring import score
from ffnscope.types import PruningPlan
from offload import KINDS
from reference import text
from tiny import logits, tiny

MakePlan = Callable[..., PruningPlan]
METRICS = ("wanda", "scar_loss_proxy", "weight_magnitude")
ARCHS = ("llama_bias", "gpt2", "phi3")
one = pytest.mark.parametrize("arch", ARCHS[:1])


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, arch: str, tmp_path: Path) -> Any:
    return KINDS[request.param](arch, tmp_path)


@pytest.fixture
def resident(arch: str) -> Any:
    return tiny(arch)


@pytest.fixture
def windows() -> Windows:
    return text(4, 12)


def meta(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.device.type == "meta"}


def same(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_sites_and_hashes(model: Any, resident: Any) -> None:
    assert find_sites(model) == find_sites(resident)
    assert weights_hash(model) == weights_hash(resident)
    assert fingerprint(model) == fingerprint(resident)


def test_statistics_and_scores(model: Any, resident: Any, windows: Windows) -> None:
    empty, flags = meta(model), [(n, p.requires_grad) for n, p in model.named_parameters()]
    found, wanted = calibrate(model, windows, METRICS), calibrate(resident, windows, METRICS)
    for site, stats in wanted.items():
        assert same(dict(found[site].values), dict(stats.values))
    for metric in METRICS:
        assert same(dict(score(model, found, metric).values), dict(score(resident, wanted, metric).values))
    assert meta(model) == empty
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags


@one
def test_a_reference_model(model: Any, resident: Any, windows: Windows) -> None:
    tuned = tiny("llama_bias", seed=1)
    stats = calibrate(tuned, windows, ["delta_alignment"])
    scores = [score(tuned, stats, "delta_alignment", reference=before) for before in (resident, model)]
    assert same(dict(scores[0].values), dict(scores[1].values))


@one
def test_capture(model: Any, resident: Any, windows: Windows, tmp_path: Path) -> None:
    found = capture(model, windows, tmp_path / "a", gradients=True)
    wanted = capture(resident, windows, tmp_path / "b", gradients=True)
    for site in find_sites(resident):
        assert torch.equal(found.h(site), wanted.h(site)) and torch.equal(found.g(site), wanted.g(site))


@pytest.mark.parametrize("allocator", ["local", "global"])
def test_mask_and_slice(model: Any, resident: Any, random_plan: MakePlan, allocator: str) -> None:
    plan, dense, hashed = random_plan(resident, allocator=allocator), logits(resident), weights_hash(resident)
    empty = meta(model)
    with masked(resident, plan):
        wanted, masked_hash = logits(resident), weights_hash(resident)
    with masked(model, plan):
        assert torch.equal(logits(model), wanted)
        assert weights_hash(model) == masked_hash
        with masked(model, random_plan(resident, seed=1)):
            assert not torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), dense) and weights_hash(model) == hashed and meta(model) == empty
    slice_(model, plan)
    assert torch.equal(logits(model), logits(slice_(resident, plan)))
    assert meta(model) == empty
    assert find_sites(model) == find_sites(resident)
    assert weights_hash(model) == weights_hash(resident)


@one
@pytest.mark.parametrize("pad", [False, True])
def test_pruned_checkpoint(model: Any, resident: Any, random_plan: MakePlan, tmp_path: Path, pad: bool) -> None:
    from transformers import AutoModelForCausalLM

    plan = random_plan(resident, allocator="global" if pad else "local")
    save_model(prune_(model, plan, pad_to_widest=pad), None, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.equal(logits(again), logits(prune_(resident, plan, pad_to_widest=pad)))


@one
@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
def test_reconstruction(model: Any, resident: Any, random_plan: MakePlan) -> None:
    windows = text(32)
    plan, empty, hashed = random_plan(resident), meta(model), weights_hash(resident)
    refits = [reconstruct(m, plan, collect(m, windows, ["h_outer"])) for m in (model, resident)]
    in_order = [reconstruct_sequential(m, windows, plan) for m in (model, resident)]
    for found, wanted in (refits, in_order):
        assert wanted.down and same(dict(found.down), dict(wanted.down))
    assert meta(model) == empty and weights_hash(model) == hashed
    assert not torch.equal(logits(reconstruct_(resident, in_order[1])), logits(tiny("llama_bias")))
    assert torch.equal(logits(reconstruct_(model, in_order[0])), logits(resident))
    assert meta(model) == empty and weights_hash(model) == weights_hash(resident)


@one
def test_evaluation(model: Any, resident: Any, random_plan: MakePlan, windows: Windows) -> None:
    plans = {"plan": random_plan(resident)}
    assert compare_plans(model, plans, windows) == compare_plans(resident, plans, windows)
