"""An FFN with an RMS norm before its down projection (BitNet): removing channels makes up for what the mean loses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cuts import distance, logits, masked_logits
from ffnscope.apply.copies import ablated_copies
from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.replace import replaced
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.collect import calibrate
from ffnscope.calibrate.observe import sum_nll
from ffnscope.calibrate.taps import channel_taps
from ffnscope.errors import NotAvailableError
from ffnscope.evaluate.costs import channel_parameters
from ffnscope.evaluate.pair import removed_parameters
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.scoring import score
from ffnscope.types import Budget, PruningPlan
from reference import text
from tiny_all import D_FF, HIDDEN, inputs_of, tiny_causal_lm

MakePlan = Callable[..., PruningPlan]
METRICS = ("wanda", "weight_magnitude", "write_norm", "scar_loss_proxy", "flap")


@pytest.fixture
def bitnet() -> Any:
    return tiny_causal_lm("bitnet")


def without(model: Any, layer: int, *channels: int) -> PruningPlan:
    site = find_sites(model)[layer]
    kept = torch.tensor([c for c in range(site.d_ff) if c not in channels])
    return PruningPlan({site: kept}, "test", "test", Budget(len(channels) / site.d_ff))


@pytest.mark.parametrize("allocator", ["local", "global"])
@pytest.mark.parametrize("sparsity", [0.25, 0.9])
def test_a_slice_is_a_mask(bitnet: Any, random_plan: MakePlan, allocator: str, sparsity: float) -> None:
    plan, other = (random_plan(bitnet, sparsity, seed=seed, allocator=allocator) for seed in (0, 1))
    dense, expected = logits(bitnet), masked_logits(bitnet, plan)
    assert torch.equal(logits(bitnet), dense)
    assert distance(logits(slice_(copy.deepcopy(bitnet), plan)), expected) < 1e-5
    assert distance(expected, dense) > 0.1
    assert distance(logits(slice_(bitnet, other)), expected) > 0.1


def test_weight_and_epsilon_of_the_norm(bitnet: Any) -> None:
    norm = bitnet.model.layers[1].mlp.ffn_sub_norm
    weight, epsilon = norm.weight.detach().clone(), norm.variance_epsilon
    slice_(bitnet, without(bitnet, 1, *range(1, D_FF // 2 + 1)))
    kept = [0, *range(D_FF // 2 + 1, D_FF)]
    assert torch.allclose(norm.weight, weight[kept] * 2**0.5)
    assert norm.variance_epsilon == pytest.approx(2 * epsilon)
    assert bitnet.model.layers[0].mlp.ffn_sub_norm.variance_epsilon == epsilon


def test_epsilon_matters_for_small_activations(bitnet: Any) -> None:
    for layer in bitnet.model.layers:
        layer.mlp.up_proj.weight.data.mul_(1e-3)  # mean squares of the order of epsilon
    plan = without(bitnet, 1, *range(D_FF // 2))
    assert distance(logits(slice_(copy.deepcopy(bitnet), plan)), masked_logits(bitnet, plan)) < 1e-5


def test_torch_norms_too(random_plan: MakePlan, bitnet: Any) -> None:
    for layer in bitnet.model.layers:
        layer.mlp.ffn_sub_norm = nn.RMSNorm(D_FF, eps=1e-6)
    plan = random_plan(bitnet, 0.5)
    expected = masked_logits(bitnet, plan)
    assert distance(logits(slice_(bitnet, plan)), expected) < 1e-5
    assert bitnet.model.layers[0].mlp.ffn_sub_norm.normalized_shape == (D_FF // 2,)


def test_two_cuts_are_one(bitnet: Any) -> None:
    once = slice_(copy.deepcopy(bitnet), without(bitnet, 0, 0, 1, 2, 3))
    slice_(bitnet, without(bitnet, 0, 2, 3))
    slice_(bitnet, without(bitnet, 0, 0, 1))
    assert distance(logits(once), logits(bitnet)) < 1e-5
    norms = [m.model.layers[0].mlp.ffn_sub_norm for m in (once, bitnet)]
    assert torch.allclose(norms[0].weight, norms[1].weight)


def test_padding_keeps_the_mean_right(bitnet: Any, random_plan: MakePlan) -> None:
    plan = random_plan(bitnet, 0.5, allocator="global")
    expected = masked_logits(bitnet, plan)
    prune_(bitnet, plan, pad_to_widest=True)
    assert {s.d_ff for s in find_sites(bitnet)} == {max(plan.widths.values())}
    assert distance(logits(bitnet), expected) < 1e-5


@pytest.mark.parametrize(("allocator", "limit"), [("local", 1e-4), ("global", 1e-6)])
def test_reload(bitnet: Any, random_plan: MakePlan, tmp_path: Path, allocator: str, limit: float) -> None:
    """One width: the stock config has one epsilon for all norms. Several: our file keeps that of each."""
    prune_(bitnet, random_plan(bitnet, allocator=allocator))
    save_model(bitnet, None, tmp_path / "saved")
    expected = logits(bitnet)
    loaded = stock(tmp_path / "saved")
    assert distance(logits(loaded), expected) < limit
    epsilon = loaded.model.layers[0].mlp.ffn_sub_norm.variance_epsilon
    same = epsilon == bitnet.model.layers[0].mlp.ffn_sub_norm.variance_epsilon
    assert same == (allocator == "global")


def stock(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()


def test_single_channels(bitnet: Any) -> None:
    """Copies without a channel, a channel set to zero, and a masked channel are one."""
    site, channels = find_sites(bitnet)[1], [5, 0]
    ids = inputs_of(bitnet)["input_ids"]
    expected = [masked_logits(bitnet, without(bitnet, 1, c)) for c in channels]
    with torch.no_grad(), ablated_copies(bitnet, site, channels, ids.numel()):
        copies = bitnet(input_ids=ids.repeat(2, 1)).logits
    assert distance(copies, torch.cat(expected)) < 1e-5
    with replaced(bitnet, {site: (torch.tensor([5]), torch.zeros(1))}):
        assert distance(logits(bitnet), expected[0]) < 1e-5
    assert distance(expected[0], logits(bitnet)) > 1e-3


def test_the_gradient_is_that_of_removing_a_channel(bitnet: Any) -> None:
    """sum of h g = slope of the loss as the channel fades, the change of the norm included."""
    bitnet = bitnet.double()
    site, batch = find_sites(bitnet)[1], text(2)
    sums: list[Tensor] = []
    with channel_taps(bitnet, [site], None, lambda _, h, g: sums.append((h * g).flatten(0, -2).sum(0))):
        loss = sum_nll(bitnet(input_ids=batch.input_ids).logits, batch)
        loss.backward()
    row = bitnet.model.layers[1].mlp.up_proj.weight.data
    channel, step = int(sums[0].abs().argmax()), 1e-2  # norms compute in float32
    losses: list[float] = []
    for factor in (1 + step, (1 - step) / (1 + step)):
        row[channel] *= factor
        with torch.no_grad():
            losses.append(float(sum_nll(bitnet(input_ids=batch.input_ids).logits, batch)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(sums[0][channel]), rel=5e-3)
    assert abs(float(sums[0].sum())) < 1e-3 * float(sums[0].abs().sum())  # a common factor is normed away


def all_scores(model: Any) -> list[Tensor]:
    stats = calibrate(model, text(3), METRICS)
    return [v for name in METRICS for v in score(model, stats, name).values.values()]


def test_scores_do_not_depend_on_where_a_factor_stands(bitnet: Any) -> None:
    """The weight of the norm times a column of down is all that counts of the two."""
    before, dense = all_scores(bitnet), logits(bitnet)
    for layer in bitnet.model.layers:
        factor = torch.linspace(0.5, 2, D_FF)
        layer.mlp.ffn_sub_norm.weight.data *= factor
        layer.mlp.down_proj.weight.data /= factor
    assert distance(logits(bitnet), dense) < 1e-5
    for a, b in zip(before, all_scores(bitnet), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)


def test_channels_in_another_order(bitnet: Any) -> None:
    before, dense = all_scores(bitnet), logits(bitnet)
    order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(0))
    for layer in bitnet.model.layers:
        mlp = layer.mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.ffn_sub_norm.weight):
            weight.data = weight.data[order]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
    assert distance(logits(bitnet), dense) < 1e-5
    for a, b in zip(before, all_scores(bitnet), strict=True):
        assert torch.allclose(a[order], b, rtol=1e-4)


def test_costs(bitnet: Any, random_plan: MakePlan) -> None:
    sites, plan = find_sites(bitnet), random_plan(bitnet, 0.5)
    assert channel_parameters(bitnet, sites[0]) == 3 * HIDDEN + 1
    cut = slice_(copy.deepcopy(bitnet), plan)
    removed = removed_parameters(bitnet, sites, cut, find_sites(cut), plan)
    assert removed.found == removed.planned == len(sites) * D_FF // 2 * (3 * HIDDEN + 1)
    assert weights_of(cut, find_sites(cut)[0]).down.shape == (HIDDEN, D_FF // 2)


def test_the_graph_is_refused_by_name(bitnet: Any) -> None:
    message = r"model.layers.0.mlp has a norm before its down projection \(ffn_sub_norm\), so what a channel writes"
    with pytest.raises(NotAvailableError, match=message):
        calibrate(bitnet, text(1), ["graph_backward"])
