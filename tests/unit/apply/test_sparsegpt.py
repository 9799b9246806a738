"""SparseGPT of one matrix against optimal brain surgeon written out, and what it must keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffnscope.apply.patterns import Pattern, highest, pattern_of
from ffnscope.apply.sparsegpt import sparsegpt
from ffnscope.errors import NonFiniteError, UsageError

OUT, IN = 12, 32
ASKED = [0.3, 0.5, "2:4", "4:8"]


def inputs(seed: int = 0, tokens: int = 200) -> Tensor:
    """Correlated inputs of different power, [tokens, IN]."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 10, generator=random, dtype=torch.float64)
    x = hidden @ torch.randn(10, IN, generator=random, dtype=torch.float64)
    x = x + 0.3 * torch.randn(tokens, IN, generator=random, dtype=torch.float64)
    return x * torch.logspace(-0.7, 0.7, IN, dtype=torch.float64)[torch.randperm(IN, generator=random)]


def weights(rows: int = OUT, seed: int = 1) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damped(x: Tensor, damping: float = 0.01) -> Tensor:
    second = x.T @ x
    return second + damping * second.diagonal().mean() * torch.eye(IN, dtype=x.dtype)


def surgeon(row: Tensor, second: Tensor, removed: Tensor | None, n: int = 0, m: int = 0) -> Tensor:
    """Remove weights of a row from left to right, each time by the inverse of what is left of the matrix; with n:m,
    choose the m - n cheapest at the start of each group."""
    row = row.clone()
    chosen = torch.zeros(IN, dtype=torch.bool) if removed is None else removed
    for j in range(IN):
        if removed is None and j % m == 0:
            costs = [row[k] ** 2 / torch.linalg.inv(second[k:, k:])[0, 0] for k in range(j, j + m)]
            chosen[j + torch.stack(costs).argsort(stable=True)[: m - n]] = True
        if chosen[j]:
            inverse = torch.linalg.inv(second[j:, j:])
            row[j:] = row[j:] - row[j] / inverse[0, 0] * inverse[:, 0]
            row[j] = 0
    return row


class TestAgainstTheSurgeon:
    @pytest.mark.parametrize("block_size", [8, IN, 128])
    def test_updates_of_a_given_mask_are_exact_in_any_blocks(self, block_size: int) -> None:
        x, weight = inputs(), weights()
        keep, new = sparsegpt(weight, x.T @ x, Pattern(0.5), block_size=block_size)
        wanted = torch.stack([surgeon(w, damped(x), ~k) for w, k in zip(weight, keep, strict=True)])
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-9)

    def test_one_row_and_one_block_are_the_exact_solution(self) -> None:
        x, row = inputs(), weights(1)
        keep, new = sparsegpt(row, x.T @ x, Pattern(0.5), block_size=IN)
        costs = [row[0, j] ** 2 / torch.linalg.inv(damped(x)[j:, j:])[0, 0] for j in range(IN)]
        removed = torch.zeros(IN, dtype=torch.bool).index_fill_(0, torch.stack(costs).argsort()[: IN // 2], value=True)
        assert torch.equal(keep[0], ~removed)
        torch.testing.assert_close(new[0], surgeon(row[0], damped(x), removed), rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("group", [(2, 4), (4, 8), (1, 4)])
    def test_groups_are_chosen_when_they_begin(self, group: tuple[int, int]) -> None:
        x, weight = inputs(), weights()
        keep, new = sparsegpt(weight, x.T @ x, pattern_of(f"{group[0]}:{group[1]}"), block_size=8)
        wanted = torch.stack([surgeon(w, damped(x), None, *group) for w in weight])
        assert torch.equal(keep, wanted != 0)
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-9)

    def test_each_weight_is_the_least_squares_answer_to_those_before_it(self) -> None:
        x, row = inputs(), weights(1)
        keep, new = sparsegpt(row, x.T @ x, Pattern(0.5), block_size=IN)
        last = int((~keep[0]).nonzero().max())  # behind it, nothing changes any more
        free, second = torch.arange(last + 1, IN), damped(x)
        change = -torch.linalg.solve(second[free][:, free], second[free][:, : last + 1] @ (new - row)[0, : last + 1])
        torch.testing.assert_close((new - row)[0, free], change, rtol=1e-8, atol=1e-9)


class TestLaws:
    @pytest.mark.parametrize("asked", ASKED)
    def test_error_is_below_wanda_and_that_below_magnitude(self, asked: float | str) -> None:
        x, weight, pattern = inputs(), weights(), pattern_of(asked)

        def error(new: Tensor) -> float:
            return float((x @ (weight - new).T).square().sum())

        norms = x.square().sum(0).sqrt()
        flat = weight.abs() if pattern.group is not None else weight.abs().reshape(1, -1)
        magnitude = error(weight * highest(flat, pattern).view(weight.shape))
        wanda = error(weight * highest(weight.abs() * norms, pattern))
        assert error(sparsegpt(weight, x.T @ x, pattern)[1]) < 0.7 * wanda < 0.7 * magnitude

    @pytest.mark.parametrize("block_size", [8, 12, 128])
    def test_every_block_has_its_share(self, block_size: int) -> None:
        keep, new = sparsegpt(weights(), inputs().T @ inputs(), Pattern(0.3), block_size=block_size)
        for part in keep.split(block_size, dim=1):
            assert int((~part).sum()) == int(0.3 * part.numel())
        assert torch.equal(new != 0, keep)

    def test_sparsity_zero_changes_nothing(self) -> None:
        weight = weights()
        keep, new = sparsegpt(weight, inputs().T @ inputs(), Pattern(0.0))
        assert keep.all()
        assert torch.equal(new, weight)

    @pytest.mark.parametrize("asked", ASKED)
    def test_order_of_rows_does_not_matter(self, asked: float | str) -> None:
        weight, second = weights(), inputs().T @ inputs()
        order = torch.randperm(OUT, generator=torch.Generator().manual_seed(3))
        keep, new = sparsegpt(weight, second, pattern_of(asked))
        turned, changed = sparsegpt(weight[order], second, pattern_of(asked))
        assert torch.equal(turned, keep[order])
        torch.testing.assert_close(changed, new[order])

    def test_scale_of_the_inputs_does_not_matter(self) -> None:
        second = inputs().T @ inputs()
        second[[3, 20]] = 0
        second[:, [3, 20]] = 0
        first, again = (sparsegpt(weights(), c * second, Pattern(0.5)) for c in (1.0, 1024.0))
        assert torch.equal(first[0], again[0])
        torch.testing.assert_close(first[1], again[1])

    def test_inputs_that_are_never_active_go_first_and_not_more_of_them(self) -> None:
        second = inputs().T @ inputs()
        second[[3, 20]] = 0
        second[:, [3, 20]] = 0
        keep, _ = sparsegpt(weights(), second, Pattern(0.5), block_size=IN)
        assert not keep[:, [3, 20]].any()
        keep, new = sparsegpt(weights(), second, Pattern(1 / IN), block_size=IN)
        assert int((~keep).sum()) == OUT
        assert torch.equal(new[:, [0, 31]], weights()[:, [0, 31]])
        keep, new = sparsegpt(weights(), torch.zeros_like(second), Pattern(0.5))
        assert int((~keep).sum()) == OUT * IN // 2
        torch.testing.assert_close(new[keep], weights()[keep])

    def test_arguments_do_not_change(self) -> None:
        weight, second = weights(), inputs().T @ inputs()
        copies = weight.clone(), second.clone()
        sparsegpt(weight, second, Pattern(0.5))
        assert torch.equal(weight, copies[0])
        assert torch.equal(second, copies[1])


class TestRefusals:
    def test_widths_that_are_no_multiple(self) -> None:
        with pytest.raises(UsageError, match=r"2:4 needs a width and a block_size that are multiples; got 32, 6\."):
            sparsegpt(weights(), inputs().T @ inputs(), pattern_of("2:4"), block_size=6)

    def test_sums_that_are_not_finite(self) -> None:
        second = inputs().T @ inputs()
        second[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="second moment of the inputs is not finite or not positive definite"):
            sparsegpt(weights(), second, Pattern(0.5))

    def test_weights_that_are_not_finite(self) -> None:
        weight = weights()
        weight[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match="the weights hold NaN or infinity"):
            sparsegpt(weight, inputs().T @ inputs(), Pattern(0.5))
