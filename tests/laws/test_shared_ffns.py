"""FFNs that several layers share (Zamba), also with adapters of each use (Zamba2): one site, all of its uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuts import distance, logits, masked_logits
from ffnscope.analyze.ablation import ablate_channels
from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.replace import replaced
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.capture import capture
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.memory import pass_bytes
from ffnscope.calibrate.observe import sum_nll
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.evaluate.costs import Work, channel_parameters, count_costs
from ffnscope.evaluate.pair import removed_parameters
from ffnscope.evaluate.perplexity import token_losses
from ffnscope.ffn.projection import coupled, uses_of
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import STATISTICS
from ffnscope.rules import Statistic
from ffnscope.scoring import score
from ffnscope.types import Budget, PruningPlan
from reference import text
from tiny_all import D_FF, HIDDEN, tiny_causal_lm

MakePlan = Callable[..., PruningPlan]
NAMES = ("zamba", "zamba2", "zamba2, two blocks")
METRICS = ("wanda", "weight_magnitude", "scar_loss_proxy")

each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def model(name: str) -> Any:
    return tiny_causal_lm(name)


def are_tied(model: Any) -> bool:
    """Whether every use of every site holds the same parameter objects, in one width."""
    for site in find_sites(model):
        held = [[getattr(e.module, e.name) for e in coupled(model, use, torch.arange(1))] for use in uses_of(site)]
        if len(held) < 2 or any([p is q for p, q in zip(held[0], one, strict=True)].count(False) for one in held):
            return False
    return True


def reloaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()


@each
def test_a_slice_is_a_mask_and_ties_stay(model: Any, random_plan: MakePlan) -> None:
    plan, other = random_plan(model), random_plan(model, seed=1)
    dense, expected = logits(model), masked_logits(model, plan)
    assert torch.equal(logits(model), dense)
    assert are_tied(model)
    size = sum(p.numel() for p in model.parameters())
    cut = slice_(copy.deepcopy(model), plan)
    assert distance(logits(cut), expected) < 1e-4
    assert distance(expected, dense) > 0.1
    assert are_tied(cut)
    gone = sum((s.d_ff - k.numel()) * channel_parameters(model, s) for s, k in plan.kept.items())
    assert size - sum(p.numel() for p in cut.parameters()) == gone
    assert distance(logits(slice_(model, other)), expected) > 0.1


@each
@pytest.mark.parametrize("allocator", ["local", "global"])
def test_reload(model: Any, random_plan: MakePlan, tmp_path: Path, allocator: str) -> None:
    plan = random_plan(model, allocator=allocator)
    prune_(model, plan)
    save_model(model, None, tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_ffnscope.py").exists() == (len(set(plan.widths.values())) > 1)
    loaded = reloaded(tmp_path / "saved")
    assert distance(logits(loaded), logits(model)) == 0
    assert are_tied(loaded)
    assert [s.d_ff for s in find_sites(loaded)] == list(plan.widths.values())


def test_padding(random_plan: MakePlan) -> None:
    model = tiny_causal_lm("zamba2, two blocks")
    plan = random_plan(model, 0.5, allocator="global")
    expected = masked_logits(model, plan)
    prune_(model, plan, pad_to_widest=True)
    assert {s.d_ff for s in find_sites(model)} == {max(plan.widths.values())}
    assert are_tied(model)
    assert distance(logits(model), expected) < 1e-4


@each
def test_statistics_are_sums_over_all_uses(model: Any) -> None:
    """Against hooks on every down projection, and gradients of all of them by autograd."""
    sites, batch = find_sites(model), text(3)
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            args[0].retain_grad()
            seen[path] = args[0]

        return hook

    paths = [use.projections[-1] for site in sites for use in uses_of(site)]
    handles = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    with torch.enable_grad():
        sum_nll(model(input_ids=batch.input_ids).logits, batch).backward()
    for handle in handles:
        handle.remove()
    found = calibrate(model, batch, ["wanda", "scar_curvature", "scar_taylor"], options=PassOptions(batch_size=2))
    for site, stats in found.items():
        uses = [seen[use.projections[-1]] for use in uses_of(site)]
        h = torch.cat([u.detach().flatten(0, -2) for u in uses])
        g = torch.cat([u.grad.flatten(0, -2) for u in uses])
        assert stats.counts["act_sq"] == len(uses) * batch.n_tokens
        assert stats.counts["grad_sq"] == len(uses) * batch.n_targets
        assert torch.allclose(stats.total("act_sq"), h.double().square().sum(0), rtol=1e-4)
        assert torch.allclose(stats.total("grad_sq"), g.double().square().sum(0), rtol=1e-3)
        assert torch.allclose(stats.total("taylor_abs"), (h * g).double().abs().sum(0), rtol=1e-3)


def in_order(model: Any, order: Tensor) -> None:
    """Give the channels of every site another order, once for each parameter."""
    changed: set[int] = set()
    for site in find_sites(model):
        for new, old in zip(coupled(model, site, torch.arange(D_FF)), coupled(model, site, order), strict=True):
            if id(new.parameter) not in changed:
                changed.add(id(new.parameter))
                new.parameter.data.index_copy_(new.axis, new.index, old.parameter.index_select(old.axis, old.index))


def all_scores(model: Any) -> list[Tensor]:
    stats = calibrate(model, text(3), METRICS)
    return [v for name in METRICS for v in score(model, stats, name).values.values()]


@each
def test_channels_in_another_order(model: Any) -> None:
    before, dense = all_scores(model), logits(model)
    order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(0))
    in_order(model, order)
    assert distance(logits(model), dense) < 1e-4
    for a, b in zip(before, all_scores(model), strict=True):
        assert torch.allclose(a[order], b, rtol=1e-3)
        assert not torch.allclose(a, b, rtol=1e-3)


@each
def test_a_channel_is_removed_from_all_uses(model: Any) -> None:
    site, windows = find_sites(model)[-1], text(2)
    channels = torch.tensor([3, 0])
    found = ablate_channels(model, {site: channels}, windows, batch_size=4)
    everything = torch.arange(D_FF)
    with torch.no_grad():
        dense = token_losses(model(input_ids=windows.input_ids).logits, windows)
        for row, channel in enumerate(channels.tolist()):
            plan = PruningPlan({site: everything[everything != channel]}, "test", "test", Budget(1 / D_FF))
            with masked(model, plan):
                change = token_losses(model(input_ids=windows.input_ids).logits, windows) - dense
            assert torch.allclose(found.change[site][row], change.sum(1).double(), atol=1e-4)
            assert float(change.abs().max()) > 1e-3
            with replaced(model, {site: (torch.tensor([channel]), torch.zeros(1))}):
                zeroed = token_losses(model(input_ids=windows.input_ids).logits, windows) - dense
            assert distance(zeroed, change) < 1e-4


@each
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_offloaded(model: Any, name: str, kind: str, random_plan: MakePlan, tmp_path: Path) -> None:
    """Offloaded weights are separate and empty; the model's list of ties tells that they are one."""
    from accelerate import cpu_offload, disk_offload

    sites, plan, dense = find_sites(model), random_plan(model), logits(model)
    expected = masked_logits(model, plan)
    sliced = logits(slice_(tiny_causal_lm(name), plan))
    if kind == "memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    assert find_sites(model) == sites
    assert distance(masked_logits(model, plan), expected) < 1e-5
    assert distance(logits(model), dense) < 1e-5
    prune_(model, plan)
    assert distance(logits(model), sliced) < 1e-5
    save_model(model, None, tmp_path / "saved")
    loaded = reloaded(tmp_path / "saved")
    assert distance(logits(loaded), sliced) < 1e-5
    assert are_tied(loaded)


def test_parameters_count_once(random_plan: MakePlan) -> None:
    model = tiny_causal_lm("zamba2, two blocks")
    sites, plan, rank = find_sites(model), random_plan(model), model.config.adapter_rank
    assert channel_parameters(model, sites[0]) == 3 * HIDDEN + 2 * 2 * rank
    cut = slice_(copy.deepcopy(model), plan)
    removed = removed_parameters(model, sites, cut, find_sites(cut), plan)
    assert removed.found == removed.planned == 2 * (D_FF // 4) * (3 * HIDDEN + 4 * rank)


def test_a_pattern_may_name_any_use() -> None:
    model = tiny_causal_lm("zamba2, two blocks")
    first, second = find_sites(model)
    assert find_sites(model, ["layers.1.shared_transformer.feed_forward"]) == [first]
    assert find_sites(model, ["layers.5.shared_transformer.feed_forward.down_proj"]) == [second]


def test_memory_of_every_use() -> None:
    sites = find_sites(tiny_causal_lm("zamba"))
    plain = [uses_of(sites[0])[0]]
    more = pass_bytes(sites, ["taylor_sum"], 10, torch.float32) - pass_bytes(plain, ["taylor_sum"], 10, torch.float32)
    assert more == 10 * D_FF * 4


def test_what_cannot_work_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm("zamba")
    sites, name = find_sites(model), "model.layers.2.shared_transf.feed_forward"
    with pytest.raises(NotAvailableError, match=f"{name} is used by 2 layers, so a token has several activations"):
        capture(model, text(1), tmp_path / "capture")
    with pytest.raises(NotAvailableError, match=f"{name} of ZambaForCausalLM is used by 2 layers; FLOPs and bytes"):
        count_costs(model, sites, Work())
    with pytest.raises(NotAvailableError, match=f"{name} is used by 2 layers, so it is no single branch"):
        calibrate(model, text(1), ["graph_backward"])
    STATISTICS.names()
    mixed = Statistic("mixed", lambda x, g: x.T @ g, ("x", "g"), "sum", ("d_model", "d_ff"), 1, "Made up.")
    monkeypatch.setitem(STATISTICS._items, "mixed", mixed)
    with pytest.raises(UsageError, match=r"'mixed' reads x, g together.*cannot be told which belong together"):
        Accumulator(sites, ["mixed"])
