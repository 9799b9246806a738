"""Paired comparison of two plans by their losses."""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch

from ffnscope.analyze.paired import paired_losses
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError


def windows(documents: list[int]) -> Windows:
    ids = torch.full((len(documents), 5), 3)
    return contiguous_windows(ids, "text", torch.tensor(documents))


def test_by_hand():
    nll = {"a": torch.tensor([4.0, 8.0, 6.0, 2.0]), "b": torch.tensor([4.0, 4.0, 8.0, 2.0])}
    (one,) = paired_losses(nll, windows([0, 0, 1, 1]), [("a", "b")])
    # documents: +4 and -2 nats over 8 targets each
    assert one.difference == pytest.approx(2 / 16)
    r = 2 / 16
    assert one.stderr == pytest.approx(sqrt(2 / 1 * ((4 - 8 * r) ** 2 + (-2 - 8 * r) ** 2)) / 16)
    assert one.perplexities == pytest.approx((exp(20 / 16), exp(18 / 16)))
    assert (one.documents, one.n_targets) == (2, 16)
    assert one.row()["loss_difference"] == one.difference


def test_the_other_way_round_and_with_itself():
    nll = {"a": torch.tensor([4.0, 8.0]), "b": torch.tensor([5.0, 6.0])}
    ab, ba, aa = paired_losses(nll, windows([0, 1]), [("a", "b"), ("b", "a"), ("a", "a")])
    assert ab.difference == -ba.difference and ab.stderr == ba.stderr
    assert (aa.difference, aa.stderr) == (0, 0)


def test_one_document_has_no_standard_error():
    (one,) = paired_losses({"a": torch.ones(2), "b": torch.zeros(2)}, windows([7, 7]), [("a", "b")])
    assert one.stderr is None


def test_what_was_not_measured_is_refused():
    with pytest.raises(UsageError, match="the loss of 'c' was measured on nothing; expected 2 windows"):
        paired_losses({"a": torch.ones(2)}, windows([0, 1]), [("a", "c")])
    with pytest.raises(UsageError, match="the loss of 'a' was measured on 3 windows; expected 2 windows"):
        paired_losses({"a": torch.ones(3)}, windows([0, 1]), [("a", "a")])
