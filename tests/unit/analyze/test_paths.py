"""Top channels per layer and the direct paths between them, against loops by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.analyze.paths import strongest_paths, top_nodes
from ffnscope.calibrate.collect import calibrate
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.scoring import score
from tiny import tiny, tokens
from tiny_moe import tiny_moe


def test_the_best_channels_of_each_layer() -> None:
    model = tiny("llama")
    scores = score(model, find_sites(model), "magnitude")
    nodes = top_nodes(scores, 3)
    assert [len(own) for own in nodes.values()] == [3, 3]
    for site, own in nodes.items():
        expected = scores.values[site].topk(3)
        assert [node.channel for node in own] == expected.indices.tolist()
        assert [node.score for node in own] == expected.values.tolist()
        assert {node.layer for node in own} == {site.layer}


def test_experts_of_a_layer_compete() -> None:
    model = tiny_moe("mixtral")
    nodes = top_nodes(score(model, find_sites(model), "magnitude"), 5)
    per_layer = [sum(len(own) for site, own in nodes.items() if site.layer == layer) for layer in (0, 1)]
    assert per_layer == [5, 5]
    assert all(":" in node.name for own in nodes.values() for node in own)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
def test_strength_by_hand(arch: str) -> None:
    model: Any = tiny(arch)
    sites = find_sites(model)
    stats = calibrate(model, contiguous_windows(tokens(), "random tokens"), ["activation_l2_norm"])
    nodes = top_nodes(score(model, stats, "activation_l2_norm"), 4)
    first, second = (weights_of(model, site) for site in sites)
    rms = stats[sites[0]].mean("act_sq").sqrt()
    expected = {}
    for a in nodes[sites[0]]:
        for b in nodes[sites[1]]:
            rows = [m[b.channel] for m in (second.gate, second.up) if m is not None]
            dots = [abs(float(row @ first.down[:, a.channel])) for row in rows]
            expected[a.channel, b.channel] = max(dots) * float(rms[a.channel])
    found = strongest_paths(model, nodes, stats, n=10)
    assert [p.strength for p in found] == pytest.approx(sorted(expected.values(), reverse=True)[:10], rel=1e-5)
    for path in found:
        assert expected[path.source.channel, path.target.channel] == pytest.approx(path.strength, rel=1e-5)
    bare = strongest_paths(model, nodes)
    assert len(bare) == 16
    assert bare[0].strength >= bare[-1].strength > 0


def test_refusals() -> None:
    model = tiny("llama")
    scores = score(model, find_sites(model), "magnitude")
    with pytest.raises(UsageError, match="per_layer must be at least 1"):
        top_nodes(scores, 0)
    with pytest.raises(UsageError, match="n must be at least 1, the number of paths; got 0"):
        strongest_paths(model, top_nodes(scores), n=0)
    assert torch.is_tensor(scores.values[scores.sites[0]])
