"""Least squares of the down projection against what numpy and hand computation give."""

import numpy as np
import pytest
import torch

from ffnscope.apply.refit import DAMPINGS, LeastSquares, Moments, choose_damping, mean_bias, refit_down
from ffnscope.errors import NonFiniteError, UsageError


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)


@pytest.fixture
def down():
    return torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moments_of(h, shift=None):
    if shift is None:
        return Moments(h.T @ h, len(h))
    return Moments(h.T @ h, len(h), shift.T @ h, shift.square().sum(0))


KEPT = torch.tensor([0, 3, 4, 7, 10])


def output_error(down, new, kept, moments):
    return LeastSquares.of(down, kept, moments).error(new)


@pytest.mark.parametrize("shifted", [False, True])
def test_it_is_the_ridge_solution_of_numpy(tokens, down, shifted):
    shift = torch.randn(200, 5, dtype=torch.float64) if shifted else None
    found = refit_down(down, KEPT, moments_of(tokens, shift), 0.05)
    wanted = tokens @ down.T + (0 if shift is None else shift)
    rows = tokens[:, KEPT]
    pull = np.sqrt(0.05 * float(rows.square().sum(0).mean()))
    stacked = np.vstack([rows, pull * np.eye(5)])
    target = np.vstack([wanted, pull * down[:, KEPT].T.numpy()])
    expected = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_duplicate_channels_are_replaced_exactly(tokens, down):
    removed = torch.tensor([1, 2, 5, 6, 8, 9, 11])
    tokens[:, removed] = tokens[:, KEPT] @ torch.randn(5, 7, dtype=torch.float64)
    found = refit_down(down, KEPT, moments_of(tokens), 1e-12)
    assert output_error(down, found, KEPT, moments_of(tokens)) < 1e-12
    torch.testing.assert_close(tokens[:, KEPT] @ found.T, tokens @ down.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_error_is_that_of_the_outputs(tokens, down, shifted):
    shift = torch.randn(200, 5, dtype=torch.float64) if shifted else None
    moments, new = moments_of(tokens, shift), torch.randn(5, 5, dtype=torch.float64)
    wanted = tokens @ down.T + (0 if shift is None else shift)
    expected = (wanted - tokens[:, KEPT] @ new.T).square().sum(1).mean()
    problem = LeastSquares.of(down, KEPT, moments)
    assert problem.error(new) == pytest.approx(float(expected), rel=1e-10)
    old = (wanted - tokens[:, KEPT] @ down[:, KEPT].T).square().sum(1).mean()
    assert problem.without == problem.error(down[:, KEPT]) == pytest.approx(float(old), rel=1e-10)
    assert problem.power == pytest.approx(float(wanted.square().sum(1).mean()), rel=1e-10)


def test_a_refit_never_raises_the_error_on_its_own_tokens(tokens, down):
    moments = moments_of(tokens)
    before = output_error(down, down[:, KEPT], KEPT, moments)
    errors = [output_error(down, refit_down(down, KEPT, moments, d), KEPT, moments) for d in DAMPINGS]
    assert errors == sorted(errors) and errors[-1] < before


def test_nothing_removed_leaves_the_weights(tokens, down):
    torch.testing.assert_close(refit_down(down, torch.arange(12), moments_of(tokens)), down)


def test_float32_follows_float64(tokens, down):
    moments = moments_of(tokens)
    single = Moments(moments.second.float(), moments.n_tokens)
    torch.testing.assert_close(
        refit_down(down, KEPT, single).double(), refit_down(down, KEPT, moments), rtol=1e-3, atol=1e-4
    )
    assert refit_down(down.bfloat16(), KEPT, moments).dtype == torch.float64


def test_a_singular_second_moment_is_damped_further(down):
    h = torch.randn(3, 12)  # fewer tokens than channels
    found = refit_down(down.float(), KEPT, moments_of(h), 1e-9)
    assert bool(torch.isfinite(found).all())


def test_damping_is_chosen_on_other_tokens(tokens, down):
    few, others = (LeastSquares.of(down, KEPT, moments_of(part)) for part in (tokens[:6], tokens[6:]))
    best, errors = choose_damping(few, others)
    assert list(errors) == list(DAMPINGS) and errors[best] == min(errors.values())
    silent = LeastSquares.of(down, KEPT, moments_of(torch.zeros(4, 12, dtype=torch.float64)))
    assert choose_damping(silent, silent)[0] == max(DAMPINGS)


def test_parts_add_up(tokens, down):
    shift = torch.randn(200, 5, dtype=torch.float64)
    whole = moments_of(tokens, shift)
    joined = moments_of(tokens[:50], shift[:50]) + moments_of(tokens[50:], shift[50:])
    torch.testing.assert_close(refit_down(down, KEPT, joined), refit_down(down, KEPT, whole))
    assert joined.n_tokens == 200
    plain = moments_of(tokens[:50]) + moments_of(tokens[50:])
    torch.testing.assert_close(plain.second, whole.second)


def test_order_of_channels_does_not_matter(tokens, down):
    order = torch.randperm(12)
    place = torch.empty_like(order)
    place[order] = torch.arange(12)
    kept, by = place[KEPT].sort()
    found = refit_down(down[:, order], kept, moments_of(tokens[:, order]))
    torch.testing.assert_close(found, refit_down(down, KEPT, moments_of(tokens))[:, by])


def test_the_bias_is_the_mean_of_what_is_lost(tokens, down):
    bias = mean_bias(down, KEPT, tokens.mean(0))
    lost = tokens @ down.T - tokens[:, KEPT] @ down[:, KEPT].T
    torch.testing.assert_close(bias, lost.mean(0))


def test_bad_input(tokens, down):
    moments = moments_of(tokens)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="damping must be positive"):
            refit_down(down, KEPT, moments, damping)
    with pytest.raises(NonFiniteError, match="failed with every damping"):
        refit_down(down, KEPT, Moments(moments.second * float("nan"), 200))
    with pytest.raises(UsageError, match="moments disagree"):
        Moments(moments.second[:3], 200)
    with pytest.raises(UsageError, match="both shift and shift_sq"):
        Moments(moments.second, 200, down)
