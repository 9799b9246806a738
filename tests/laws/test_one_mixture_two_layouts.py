"""A mixture whose experts are modules in a list is to everything the same as one whose experts are stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.analyze.ablation import ablate_channels
from ffnscope.analyze.levels import calibrate_all
from ffnscope.apply.copies import NOTHING, ablated_copies
from ffnscope.apply.mask import masked
from ffnscope.evaluate.costs import Work, count_costs
from ffnscope.ffn.graph import decoder_graph
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.stream import find_stream
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import Budget, FFNSite, PruningPlan
from reference import padded
from tiny import logits, tokens
from tiny_listed import tiny_listed, unstacked
from tiny_moe import EXPERT, N_EXPERTS, tiny_moe


@pytest.fixture
def fused() -> Any:
    return tiny_moe("mixtral", dtype=torch.float64)


@pytest.fixture
def listed() -> Any:
    return unstacked(tiny_moe("mixtral", dtype=torch.float64))


def without(site: FFNSite, channel: int) -> PruningPlan:
    kept = torch.tensor([c for c in range(site.d_ff) if c != channel])
    return PruningPlan({site: kept}, "by hand", "local", Budget(0.1))


def pairs(fused: Any, listed: Any) -> list[tuple[FFNSite, FFNSite]]:
    found = list(zip(find_sites(fused), find_sites(listed), strict=True))
    assert all(a.stacked and not b.stacked and (a.layer, a.expert) == (b.layer, b.expert) for a, b in found)
    assert len(found) == 2 * N_EXPERTS
    return found


def test_the_two_compute_the_same(fused: Any, listed: Any) -> None:
    torch.testing.assert_close(logits(listed), logits(fused), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dispatch", ["mixtral", "index", "leading", "mask", "sorted", "twice"])
def test_a_channel_ablated_in_a_copy_equals_the_mask(dispatch: str, listed: Any) -> None:
    model = listed if dispatch == "mixtral" else tiny_listed(dispatch).double()
    ids, channels = tokens(2, 12), [3, NOTHING, 0, EXPERT - 1]
    dense, moved = logits(model, ids), 0.0
    for site in find_sites(model):
        with ablated_copies(model, site, channels, ids.numel()):
            copies = logits(model, ids.repeat(len(channels), 1)).unflatten(0, (len(channels), -1))
        for copy, channel in zip(copies, channels, strict=True):
            expected = dense
            if channel != NOTHING:
                with masked(model, without(site, channel)):
                    expected = logits(model, ids)
                moved = max(moved, float((expected - dense).abs().max()))
            torch.testing.assert_close(copy, expected, rtol=1e-9, atol=1e-9)
    assert moved > 1e-2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model, ids), dense)


def test_nothing_stays_on_the_model_after_an_exception(listed: Any) -> None:
    (site, *_), dense = find_sites(listed), logits(listed)
    with pytest.raises(KeyboardInterrupt), ablated_copies(listed, site, [0], 24):
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in listed.modules())
    assert torch.equal(logits(listed), dense)


def test_ablations_are_the_same(fused: Any, listed: Any) -> None:
    text, channels = padded([12, 7, 9], 12), torch.tensor([0, 5])
    one = ablate_channels(fused, dict.fromkeys(find_sites(fused), channels), text, batch_size=4)
    other = ablate_channels(listed, dict.fromkeys(find_sites(listed), channels), text, batch_size=4)
    for a, b in pairs(fused, listed):
        torch.testing.assert_close(other.change[b], one.change[a], rtol=1e-6, atol=1e-9)
    assert max(float(value.abs().max()) for value in one.change.values()) > 1e-4


def test_the_graph_is_the_same(fused: Any, listed: Any) -> None:
    graphs = [decoder_graph(m, find_sites(m)) for m in (fused, listed)]
    assert [graph.missing for graph in graphs] == [(), ()]
    assert [len(step) for step in graphs[1].steps] == [1, N_EXPERTS] * 2
    streams = [find_stream(m, find_sites(m)) for m in (fused, listed)]
    assert streams[0].observed == streams[1].observed
    for one, other in zip(*(graph.branches for graph in graphs), strict=True):
        torch.testing.assert_close(other.norm, one.norm, rtol=1e-4, atol=1e-4)  # measured, with other random numbers
        for a, b in zip((*one.readers, one.down), (*other.readers, other.down), strict=True):
            with a.read() as wanted, b.read() as found:
                assert torch.equal(found, wanted)


def test_every_metric_gives_the_same_scores(fused: Any, listed: Any) -> None:
    text = padded([16, 9, 4, 13])
    names = [name for name in METRICS.names() if name not in ("composite", "delta_alignment")]
    found = []
    for model in (fused, listed):
        stats, core = calibrate_all(model, text, {n: {} for n in names}, sites=find_sites(model))
        found.append({name: score(model, stats, name, core=core) for name in names})
    for name in names:
        for a, b in pairs(fused, listed):
            torch.testing.assert_close(
                found[1][name].values[b], found[0][name].values[a], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_costs_are_the_same(fused: Any, listed: Any, batch_size: int) -> None:
    work = Work(batch_size, prompt_length=16, new_tokens=4)
    assert count_costs(listed, find_sites(listed), work) == count_costs(fused, find_sites(fused), work)
