import pytest
import torch

from ffnscope.calibrate.rows import TokenRows
from ffnscope.errors import LayoutError
from ffnscope.types import FFNSite

SITE = FFNSite(0, "layers.0.mlp.experts", "gate_up_proj", "gate_up_proj", "down_proj", 4, 6, fused="gate_up", expert=1)
# two windows of 4 tokens, the second with one token of padding
VALID = torch.tensor([[True] * 4, [True] * 3 + [False]])
TARGETS = torch.tensor([[False, True, False, True], [False, False, True, False]])


def routed(tokens: list[int]) -> TokenRows:
    rows = TokenRows(VALID, TARGETS)
    rows.route(SITE, torch.tensor(tokens))
    return rows


def numbered(n: int) -> torch.Tensor:
    return torch.arange(float(n))[:, None].expand(n, 6)


def test_padding_is_left_out_of_the_tokens_of_an_expert():
    assert routed([6, 7, 1]).take(SITE, numbered(3))[:, 0].tolist() == [0.0, 2.0]


def test_every_kth_of_the_tokens_of_each_window_in_their_order():
    rows = routed([6, 3, 7, 0, 1, 5])
    assert rows.take(SITE, numbered(6), 2)[:, 0].tolist() == [3.0, 1.0, 5.0]  # tokens 0 and 3, then 5
    assert rows.take(SITE, numbered(6), 16)[:, 0].tolist() == [3.0, 5.0]  # the first of each window


def test_targets_are_the_tokens_that_predict_one():
    assert routed([0, 2, 5]).n_targets(SITE) == 3
    assert routed([1, 3, 4, 6, 7]).n_targets(SITE) == 0


def test_only_padding():
    rows = routed([7])
    assert rows.take(SITE, numbered(1)).shape == (0, 6)
    assert rows.take(SITE, numbered(1), 16).shape == (0, 6)


def test_a_signal_of_other_length_is_refused():
    with pytest.raises(LayoutError, match=r"layers.0.mlp.experts.1 was given 2 rows for a batch of \(2, 4\)"):
        routed([0, 1, 2]).take(SITE, numbered(2))


def test_tokens_outside_the_text_are_refused():
    with pytest.raises(LayoutError, match=r"layers.0.mlp.experts.1 was given token 8 of a batch of \(2, 4\)"):
        routed([8])


def test_an_expert_that_runs_twice_is_refused():
    rows = routed([0])
    with pytest.raises(LayoutError, match=r"layers.0.mlp.experts.1 ran twice in one forward"):
        rows.route(SITE, torch.tensor([1]))
