"""The sample of channels: spread over FFNs and scores, seeded, fair to every channel."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ffnscope.analyze.sample import ChannelSample
from ffnscope.errors import UsageError
from ffnscope.types import FFNSite, Scores


def scores(n_layers: int, d_ff: int = 40, seed: int = 0) -> Scores:
    random = torch.Generator().manual_seed(seed)
    sites = [FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 8, d_ff) for i in range(n_layers)]
    return Scores("by hand", {site: torch.randn(d_ff, generator=random) for site in sites})


def test_one_channel_of_each_quantile_of_evenly_spaced_ffns() -> None:
    one = scores(30)
    drawn = ChannelSample(40, 5).draw(one)
    assert [site.layer for site in drawn] == [0, 7, 14, 22, 29]
    for site, index in drawn.items():
        assert index.tolist() == sorted(set(index.tolist()))
        ranks = one.values[site].argsort().argsort()[index]
        assert sorted((ranks // 5).tolist()) == list(range(8))


def test_every_channel_has_the_same_chance() -> None:
    one = scores(1, d_ff=20)
    counts = Counter(
        c for seed in range(1500) for c in next(iter(ChannelSample(4, 1, seed).draw(one).values())).tolist()
    )
    assert len(counts) == 20
    assert all(230 < n < 370 for n in counts.values())  # 300 expected


def test_seeds_and_shares() -> None:
    one = scores(3)
    first, again, other = (ChannelSample(10, 3, seed).draw(one) for seed in (0, 0, 1))
    assert all(torch.equal(first[s], again[s]) for s in first)
    assert any(not torch.equal(first[s], other[s]) for s in first)
    assert [len(index) for index in first.values()] == [4, 3, 3]
    assert [len(index) for index in ChannelSample(500, 8).draw(one).values()] == [40, 40, 40]
    (middle,) = ChannelSample(4, 1).draw(one)
    assert middle.layer == 1


def test_experts_without_scores_are_left_out() -> None:
    one = scores(3)
    found = Scores("by hand", one.values, {"unreached": ["layers.0.mlp", "layers.2.mlp"]})
    assert [site.layer for site in ChannelSample(4, 2).draw(found)] == [1]
    everything = Scores("by hand", one.values, {"unreached": [site.name for site in one.values]})
    with pytest.raises(UsageError, match="hold no FFN to draw channels from"):
        ChannelSample().draw(everything)


@pytest.mark.parametrize("sizes", [(1, 1), (8, 0), (4, 5)])
def test_refused_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="a sample needs at least 2 channels, and at least 1 FFN but no more"):
        ChannelSample(*sizes)
