"""Products with gathered rows against dense products, compiled and in torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.sparse.kernels import break_even as timing
from ffnscope.sparse.kernels.ffn import RowWeights, sparse_ffn
from ffnscope.sparse.kernels.rows import COMPILED_DTYPES, RowMatrix, why_not_compiled
from ffnscope.sparse.products import Products
from ffnscope.types import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("k", [0, 1, 2, 5, 16, 37])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, compiled, k, n_tokens, threads) -> None:
    torch.set_num_threads(threads)
    weight, x, h = random(37, 19, dtype=dtype), random(n_tokens, 19, dtype=dtype), random(n_tokens, k or 1, dtype=dtype)
    matrix, index, h = RowMatrix(weight, compiled=compiled), torch.randperm(37)[:k].int(), h[:, :k]
    assert matrix.compiled == (compiled and dtype in COMPILED_DTYPES) and matrix.copied_bytes == 0
    chosen, limit = weight[index.long()], TOLERANCE[dtype]
    for found, expected in ((matrix.dot(x, index), x @ chosen.T), (matrix.sum(h, index), h @ chosen)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=limit * 10, rtol=limit)


def test_rows_of_a_view_are_copied() -> None:
    weight = random(8, 6)
    assert RowMatrix(weight[2:5]).copied_bytes == 0
    assert RowMatrix(weight.T).copied_bytes == weight.nbytes
    weight[3] = 1  # seen through the view
    assert RowMatrix(weight[2:5]).dot(torch.ones(1, 6), torch.tensor([1], dtype=torch.int32)).item() == 6


def test_what_is_no_matrix() -> None:
    with pytest.raises(UsageError, match=r"floating matrix \[n, width\]; got torch.int64 \(3,\)"):
        RowMatrix(torch.arange(3))


def test_why_torch() -> None:
    assert why_not_compiled(torch.zeros(1, 1)) is None
    assert "torch.float16, and compiled kernels read float32 and bfloat16" in why_not_compiled(torch.zeros(1).half())
    assert "on meta" in why_not_compiled(torch.zeros(1, device="meta"))


def test_no_numba(monkeypatch) -> None:
    monkeypatch.setattr("ffnscope.sparse.kernels.rows.has_compiler", lambda: False)
    assert why_not_compiled(torch.zeros(1)) == "numba is not installed; pip install 'ffnscope[sparse]'"
    assert not RowMatrix(torch.zeros(1, 1)).compiled


class TestSparseFFN:
    weights = FFNWeights(random(12, 5), random(12, 5) + 1, random(5, 12))

    def test_by_hand(self) -> None:
        """gate and up of channel 0 give 2 and 3, of channel 1 give -1 and 5; ReLU; down columns (1, 10) and (7, 7)."""
        weights = FFNWeights(
            torch.tensor([[2.0, 0], [-1, 0]]), torch.tensor([[0.0, 3], [0, 5]]), torch.tensor([[1.0, 7], [10, 7]])
        )
        rows, x = RowWeights.of(weights), torch.tensor([1.0, 1])
        for index, expected in (([0], [6.0, 60]), ([1], [0, 0]), ([0, 1], [6, 60]), ([], [0, 0])):
            found = sparse_ffn(x, rows, torch.tensor(index, dtype=torch.int32), "relu")
            assert found.tolist() == expected

    def test_infinity_and_nan_are_kept(self) -> None:
        x = torch.full((1, 5), float("inf"))
        found = sparse_ffn(x, RowWeights.of(self.weights), torch.arange(12).int(), "silu")
        assert not torch.isfinite(found).any()
        found = sparse_ffn(x * float("nan"), RowWeights.of(self.weights), torch.arange(12).int(), "relu")
        assert torch.isnan(found).all()

    @pytest.mark.parametrize("n_tokens", [1, 3])
    @pytest.mark.parametrize("gated", [True, False])
    def test_what_was_read_is_not_read_again(self, gated, n_tokens) -> None:
        gate, up, down = (self.weights.gate if gated else None), self.weights.up, self.weights.down
        x, index = random(n_tokens, 5), torch.tensor([0, 3, 7], dtype=torch.int32)
        mask = torch.tensor([[True, False, True]]).expand(n_tokens, -1)
        biases = (random(12) if gated else None, random(12))
        whole = FFNWeights(gate, up, down, *biases)
        read = torch.nn.functional.linear(x, gate if gated else up, biases[0] if gated else biases[1])[:, index]
        known = Products(gate=read) if gated else Products(up=read)
        gone = torch.full_like(up, float("nan"))
        rest = FFNWeights(gone, up, down, *biases) if gated else FFNWeights(None, gone, down, *biases)
        for own in (None, mask):
            found = sparse_ffn(x, RowWeights.of(rest), index, "silu", token_mask=own, known=known)
            torch.testing.assert_close(found, sparse_ffn(x, RowWeights.of(whole), index, "silu", token_mask=own))

    def test_a_function_as_activation(self) -> None:
        rows, x, index = RowWeights.of(self.weights), random(1, 5), torch.tensor([0, 3, 7], dtype=torch.int32)
        named = sparse_ffn(x, rows, index, "silu")
        torch.testing.assert_close(sparse_ffn(x, rows, index, torch.nn.functional.silu), named)
        assert not torch.allclose(sparse_ffn(x, rows, index, torch.tanh), named)

    def test_wrong_arguments(self) -> None:
        rows, x = RowWeights.of(self.weights), random(1, 5)
        with pytest.raises(UsageError, match=r"int32 index \[k\] of channels; got torch.int64 \(3,\)"):
            sparse_ffn(x, rows, torch.arange(3), "silu")
        with pytest.raises(UnknownNameError, match=r"Unknown activation 'silo'\. Did you mean 'silu'\?"):
            sparse_ffn(x, rows, torch.arange(3).int(), "silo")


class TestBreakEven:
    @pytest.fixture(autouse=True)
    def nothing_measured(self, monkeypatch) -> None:
        monkeypatch.setattr(timing, "_rows", {})
        monkeypatch.setattr(timing, "_shares", {})
        monkeypatch.setattr(timing, "SECONDS", 0)

    @pytest.mark.parametrize(
        ("slope", "expected"),
        [(0.0, 1.0), (0.95, 1.0), (1.9, 0.5), (1.52, 0.625), (3.8, 0.25), (1.71, 1 / 1.8), (40.0, 0.0)],
    )
    def test_where_a_line_crosses(self, slope, expected) -> None:
        assert timing.RowTimes(tuple(slope * d for d in timing.DENSITIES)).limit == pytest.approx(expected)

    @pytest.mark.parametrize(("masked", "expected"), [(0.5, 0.475), (1.0, 0.5), (1.2, 0.6)])
    def test_what_runs_otherwise_is_dense_under_a_mask(self, masked, expected) -> None:
        times = timing.RowTimes(tuple(2 * d for d in timing.DENSITIES), masked)
        assert times.limit == pytest.approx(expected)

    def test_measured_once(self) -> None:
        calls = []

        def sparse(index):
            calls.append(len(index))

        def dense():
            sum(range(20_000))

        for _ in range(2):
            forms = timing.Forms([dense], [dense], [sparse])
            assert timing.row_times("shape", 64, forms, torch.device("cpu")).limit == 1.0
        assert calls[:12] == [4, 4, 8, 8, 16, 16, 32, 32, 48, 48, 64, 64]  # one before, not timed
        assert len(calls) == 2 * len(timing.DENSITIES) * (timing.ROUNDS + 1)
        forms = timing.Forms([lambda: None], [lambda: None], [lambda index: dense()])
        slower = timing.row_times("other", 64, forms, torch.device("cpu"))
        assert slower.limit == 0.0 and min(slower.ratios) > 1

    @pytest.mark.parametrize(("disturbed", "rows"), [((1, 5), True), ((1, 3, 5), False)])
    def test_rounds_that_get_slower(self, monkeypatch, disturbed, rows) -> None:
        """The first round compiles; the machine gets slower; rows are disturbed in some of the others."""
        clock = {"calls": 0, "rounds": 0}

        def seconds(run, device):
            clock["calls"] += 1
            place = (clock["calls"] - 1) % 9
            clock["rounds"] += place == 0
            speed = clock["rounds"] * (1 + 0.01 * place)
            if place in (0, 8):
                return speed
            return 0.5 * speed * (100 if clock["rounds"] in disturbed else 1)

        monkeypatch.setattr(timing, "seconds", seconds)
        forms = timing.Forms([lambda: None], [lambda: None], [lambda index: None])
        found = timing.row_times("shape", 64, forms, torch.device("cpu"))
        assert clock["rounds"] == timing.ROUNDS + 1
        assert found.ratios[3] == pytest.approx(0.5 if rows else 50, rel=0.1) and found.limit == float(rows)

    @pytest.mark.parametrize(("each", "rounds"), [(0.001, timing.MOST_ROUNDS), (0.0125, 24), (1.0, timing.ROUNDS)])
    def test_what_is_quick_is_timed_in_more_rounds(self, monkeypatch, each, rounds) -> None:
        """A clock on which every round takes so many seconds; measuring goes on until 0.3 s have passed."""
        clock = {"now": 0.0}
        monkeypatch.setattr(timing, "SECONDS", 0.3 - 1e-9)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
        turns = []
        for turn in timing._turns():
            turns.append(turn)
            clock["now"] += each if turn else 100.0
        assert turns == list(range(rounds + 1))

    def test_a_share_is_the_upper_quartile_and_measured_once(self, monkeypatch) -> None:
        lasting = iter([9.0, 9.0, *[v for share in (0.2, 9, 0.3, 0.1, 0.2, 0.25, 0.1) for v in (2.0, 2 * share)]])
        monkeypatch.setattr(timing, "seconds", lambda run, device: next(lasting))
        for _ in range(2):
            found = timing.share_of_dense("kind", [lambda: None], [lambda: None], torch.device("cpu"))
            assert found == pytest.approx(0.3)
