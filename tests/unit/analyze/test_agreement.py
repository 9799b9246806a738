"""Agreement of two score tables against scipy and hand-made cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from ffnscope.analyze.agreement import agreement, jaccard, spearman
from ffnscope.errors import UsageError
from ffnscope.metrics.ranks import average_ranks as ranks
from ffnscope.types import FFNSite, Scores


def site(layer: int, d_ff: int = 6) -> FFNSite:
    return FFNSite(layer, f"layers.{layer}.mlp", "gate", "up", "down", 4, d_ff)


def scores(*values: list[float], metric: str = "mine") -> Scores:
    return Scores(metric, {site(i, len(v)): torch.tensor(v) for i, v in enumerate(values)})


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 10_000))
def test_ranks_and_correlation_are_those_of_scipy(n: int, levels: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(levels, (n,), generator=random).double() for _ in range(2))  # many ties
    assert ranks(a).tolist() == (rankdata(a.numpy()) - 1).tolist()
    found = spearman(a, b)
    if a.unique().numel() == 1 or b.unique().numel() == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)
        assert -1 <= found <= 1


def test_correlation_of_continuous_scores_of_any_type_and_layout() -> None:
    a, b = torch.randn(2, 101, generator=torch.Generator().manual_seed(0))
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)
    strided = torch.stack([a, b], 1)
    assert spearman(strided[:, 0], strided[:, 1].double()) == pytest.approx(expected, abs=1e-12)
    assert spearman(a, a.exp()) == 1.0  # only the order counts
    assert spearman(a, -a) == -1.0


def test_jaccard_by_hand() -> None:
    a = torch.tensor([9.0, 8.0, 7.0, 1.0, 0.0])
    b = torch.tensor([9.0, 1.0, 8.0, 7.0, 0.0])
    assert jaccard(a, b, 1) == 1.0
    assert jaccard(a, b, 2) == pytest.approx(1 / 3)  # {0, 1} and {0, 2}
    assert jaccard(a, b, 3) == pytest.approx(2 / 4)  # {0, 1, 2} and {0, 2, 3}
    assert jaccard(a, b, 5) == 1.0


def test_ties_on_top_go_to_the_lower_index() -> None:
    assert jaccard(torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 1.0]), 1) == 0.0  # {0} and {3}
    assert jaccard(torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0]), 1) == 1.0


def test_agreement_is_a_mean_over_sites() -> None:
    first = scores([1, 2, 3, 4], [1, 2, 3, 4])
    second = scores([1, 2, 3, 4], [4, 3, 2, 1])
    found = agreement(first, second)
    assert found.spearman == pytest.approx(0.0)  # 1 and -1
    assert found.jaccard == 0.5  # at least one channel per site: the same in one, another in the other
    assert agreement(first, second, top=1.0).jaccard == 1.0


def test_a_constant_site_has_no_correlation_and_is_left_out() -> None:
    first, second = scores([1, 2, 3], [1, 1, 1]), scores([3, 2, 1], [1, 2, 3])
    assert agreement(first, second).spearman == -1.0
    assert agreement(scores([1, 1]), scores([1, 2])).spearman is None
    assert agreement(scores([1, 1]), scores([2, 2])).jaccard == 1.0


def test_one_per_cent_is_rounded_to_channels() -> None:
    a = torch.arange(250.0)
    b = a.clone()
    b[[248, 247]] = torch.tensor([247.0, 248.0])
    tops = Scores("a", {site(0, 250): a}), Scores("b", {site(0, 250): b})
    assert agreement(*tops).jaccard == pytest.approx(1 / 3)  # 2.5 -> 2 channels: {249, 248} and {249, 247}
    assert agreement(*tops, top=3 / 250).jaccard == 1.0


def test_refusals() -> None:
    with pytest.raises(UsageError, match="scores of 'a' and 'b' are of different sites; score the same layers"):
        agreement(scores([1, 2], metric="a"), scores([1, 2], [3, 4], metric="b"))
    with pytest.raises(UsageError, match=r"top must be in \(0, 1\], .* got 0"):
        agreement(scores([1, 2]), scores([1, 2]), top=0)
    with pytest.raises(UsageError, match="scores of 'mine' hold no site"):
        agreement(scores(), scores())
