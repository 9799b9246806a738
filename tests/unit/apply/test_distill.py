"""Training one FFN on its inputs: pure tensors, against formulas written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ffnscope.apply.distill import Distillation, distill, held_out_error
from ffnscope.apply.ffn_tokens import FFNTokens, mapped
from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN
from ffnscope.types import FFNWeights

D_MODEL, D_FF, KEPT, TOKENS, HELD = 8, 24, 12, 640, 80


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(*, gated: bool = True, biases: bool = False, dtype: torch.dtype = torch.float32) -> FFNWeights:
    gate, up = (drawn(D_FF, D_MODEL, seed=i, dtype=dtype) / D_MODEL**0.5 for i in (1, 2))
    down = drawn(D_MODEL, D_FF, seed=3, dtype=dtype) / D_FF**0.5
    rows = [drawn(D_FF, seed=i, dtype=dtype) / 4 for i in (4, 5)] if biases else [None, None]
    bias = drawn(D_MODEL, seed=6, dtype=dtype) if biases else None
    return FFNWeights(gate if gated else None, up, down, rows[0] if gated else None, rows[1], bias)


def narrowed(weights: FFNWeights, k: int = KEPT) -> FFNWeights:
    cut = {name: None if value is None else value[:k] for name, value in rows_of(weights).items()}
    bias = None if weights.down_bias is None else torch.zeros_like(weights.down_bias)
    return FFNWeights(down=weights.down[:, :k], down_bias=bias, **cut)  # type: ignore[arg-type]


def rows_of(weights: FFNWeights) -> dict[str, Tensor | None]:
    return {name: getattr(weights, name) for name in ("gate", "up", "gate_bias", "up_bias")}


def tokens_of(weights: FFNWeights, act: Any = silu, shift: Tensor | None = None) -> FFNTokens:
    """Held-out tokens come last, in two pieces each."""
    found = FFNTokens(TOKENS)
    x = drawn(TOKENS, D_MODEL, seed=9, dtype=weights.up.dtype)
    for part in (slice(0, 200), slice(200, TOKENS - HELD), slice(TOKENS - HELD, TOKENS)):
        found.add(x[part], None if shift is None else shift[part], held_out=part.start >= TOKENS - HELD)
    found.aim(weights, act)
    return found


FAST = Distillation(epochs=20, learning_rate=1e-2, batch_tokens=64)


def trained(weights: FFNWeights, options: Distillation = FAST, act: Any = silu, **given: Any) -> tuple[Any, Any]:
    tokens = given.pop("tokens", None) or tokens_of(weights, act)
    return distill(tokens, narrowed(weights), act, options, damping=1e-4, **given)


class TestTokens:
    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize("biases", [True, False])
    def test_what_is_wanted(self, gated: bool, biases: bool) -> None:
        weights, shift = dense(gated=gated, biases=biases, dtype=torch.float64), drawn(TOKENS, D_MODEL, seed=7)
        found = tokens_of(weights, gelu, shift)
        x = drawn(TOKENS, D_MODEL, seed=9, dtype=torch.float64)
        up = x @ weights.up.T + (0 if weights.up_bias is None else weights.up_bias)
        gate = None if weights.gate is None else x @ weights.gate.T
        if gate is not None and weights.gate_bias is not None:
            gate = gate + weights.gate_bias
        h = gelu(up) if gate is None else gelu(gate) * up
        assert found.wanted is not None
        torch.testing.assert_close(found.wanted, h @ weights.down.T + shift)
        assert (found.n_fit, found.n) == (TOKENS - HELD, TOKENS)

    def test_pieces_are_all_tokens_of_their_kind(self) -> None:
        found = tokens_of(dense())
        assert found.x is not None
        fit, held = (torch.cat([x for x, _ in found.pieces(held_out=h, size=100)]) for h in (False, True))
        assert torch.equal(torch.cat([fit, held]), found.x)
        assert len(held) == HELD


class TestErrors:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_mean_of_the_quadratic_form(self, weighted: bool) -> None:
        weights = dense(dtype=torch.float64, biases=True)
        tokens, some = tokens_of(weights), narrowed(weights)
        some = replace(some, down_bias=drawn(D_MODEL, seed=11, dtype=torch.float64))
        factor = drawn(D_MODEL, D_MODEL, seed=12, dtype=torch.float64)
        metric = factor @ factor.T if weighted else None
        (x, wanted), wide = next(tokens.pieces(held_out=True)), torch.eye(D_MODEL, dtype=torch.float64)
        left = wanted - FFN(some, silu).h(x) @ some.down.T - some.down_bias
        expected = sum(float(e @ (wide if metric is None else metric) @ e) for e in left) / HELD
        assert held_out_error(tokens, some, silu, metric) == pytest.approx(expected)


class TestTraining:
    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize("biases", [True, False])
    def test_better_than_least_squares_on_tokens_that_it_has_not_seen(self, gated: bool, biases: bool) -> None:
        weights = dense(gated=gated, biases=biases)
        found, facts = trained(weights)
        assert min(facts["error_trained"], facts["error_refit"]) < 0.8 * facts["error_start"]
        assert facts["error"] == pytest.approx(min(facts["error_trained"], facts["error_refit"]))
        for name, value in rows_of(narrowed(weights)).items():
            new = getattr(found, name)
            assert (new is None) == (value is None)
            assert value is None or (new.shape == value.shape and not torch.equal(new, value))
        assert (found.down_bias is not None) == biases
        assert not biases or bool(found.down_bias.any())

    def test_the_arguments_stay_as_they_are(self) -> None:
        weights = dense(biases=True)
        tokens, some = tokens_of(weights), narrowed(weights)
        before = mapped(some, torch.clone)
        x, wanted = tokens.x.clone(), tokens.wanted.clone()  # type: ignore[union-attr]
        distill(tokens, some, silu, replace(FAST, weight_decay=0.1), damping=1e-2)
        assert all(torch.equal(getattr(before, n), getattr(some, n)) for n in ("gate", "up", "down", "down_bias"))
        assert torch.equal(x, tokens.x) and torch.equal(wanted, tokens.wanted)  # type: ignore[arg-type]

    def test_the_seed_decides(self) -> None:
        first, second, other = (trained(dense(), replace(FAST, epochs=3, seed=s))[0] for s in (0, 0, 1))
        assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)
        assert not torch.equal(first.up, other.up)

    def test_epochs_are_told(self) -> None:
        seen: list[tuple[int, int]] = []
        trained(dense(), replace(FAST, epochs=3), on_epoch=lambda *now: seen.append(now))
        assert seen == [(1, 3), (2, 3), (3, 3)]

    @pytest.mark.parametrize("rate", [3.0, 1e30])
    def test_nothing_comes_of_a_rate_that_is_too_high(self, rate: float) -> None:
        found, facts = trained(dense(), replace(FAST, learning_rate=rate, patience=2))
        assert found is None
        assert (facts["epochs"], facts["epochs_run"]) == (0, 2)

    def test_noise_is_not_learned(self) -> None:
        """The dense FFN is not cut, so all that could be fitted is noise."""
        weights = dense()
        tokens = tokens_of(weights, shift=drawn(TOKENS, D_MODEL, seed=13) * 3)
        found, facts = distill(tokens, narrowed(weights, D_FF), silu, replace(FAST, learning_rate=0.03), damping=1e6)
        assert found is None and facts["epochs_run"] < FAST.epochs

    def test_the_best_epoch_is_kept(self) -> None:
        """Training goes on past the lowest held-out error on few tokens; what is kept is what had it."""
        weights = dense()
        tokens = tokens_of(weights, shift=drawn(TOKENS, D_MODEL, seed=13))
        long = replace(FAST, epochs=60, batch_tokens=32)
        seen: list[int] = []
        found, facts = distill(
            tokens, narrowed(weights), silu, long, damping=1e-2, on_epoch=lambda done, _: seen.append(done)
        )
        assert found is not None and facts["epochs"] > 0
        assert facts["epochs_run"] == seen[-1] == facts["epochs"] + long.patience < long.epochs
        assert facts["error_trained"] < facts["error_start"]

    def test_decay_pulls_towards_the_start(self) -> None:
        plain, pulled = (trained(dense(), replace(FAST, epochs=4, weight_decay=w))[0] for w in (0.0, 10.0))
        start = narrowed(dense())
        assert float((pulled.up - start.up).norm()) < 0.7 * float((plain.up - start.up).norm())

    def test_error_weights_decide_what_matters(self) -> None:
        metric = torch.zeros(D_MODEL, D_MODEL)
        metric[0, 0] = 1
        tokens = tokens_of(dense())
        plain, _ = trained(dense(), tokens=tokens)
        found, facts = trained(dense(), tokens=tokens, error_weights=metric)
        assert held_out_error(tokens, found, silu, metric) < 0.7 * held_out_error(tokens, plain, silu, metric)
        assert facts["error"] > min(facts["error_trained"], facts["error_refit"])  # that is of all outputs
        same, _ = trained(dense(), tokens=tokens, error_weights=torch.eye(D_MODEL))
        torch.testing.assert_close(same.up, plain.up, rtol=1e-3, atol=1e-3)

    def test_a_refit_is_the_last_step_where_it_helps(self) -> None:
        weights = dense()
        tokens = tokens_of(weights)
        found, facts = distill(tokens, narrowed(weights), silu, replace(FAST, epochs=2), damping=1e-4)
        assert found is not None and facts["refit"] and facts["error_refit"] < facts["error_trained"]
        again = held_out_error(tokens, found, silu, None)  # the held-out tokens are fitted too
        assert again <= facts["error_refit"]

    def test_half_precision_is_trained_wide_and_kept_narrow(self) -> None:
        weights = dense(dtype=torch.bfloat16)
        found, facts = trained(weights, replace(FAST, learning_rate=3e-3))
        wide, _ = trained(dense(), replace(FAST, learning_rate=3e-3))
        assert {value.dtype for name in ("gate", "up", "down") for value in [getattr(found, name)]} == {torch.bfloat16}
        assert facts["error_trained"] < facts["error_start"]
        # steps of 3e-3 are below the spacing of bfloat16 near 1, and would be lost
        assert float((found.up.float() - wide.up).norm()) < 0.1 * float((wide.up - narrowed(dense()).up).norm()) + 0.05


class TestOptions:
    def test_the_rate_rises_and_falls(self) -> None:
        options = Distillation(learning_rate=1.0, warmup=0.1)
        rates = [options.rate(step, 100) for step in range(100)]
        assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[55] == pytest.approx(0.5) and rates[-1] < 0.001

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"epochs": 0}, "epochs must be at least 1; got 0"),
            ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
            ({"patience": 0}, "patience must be at least 1"),
            ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
            ({"weight_decay": -1.0}, r"weight_decay must be 0 or more, warmup in \[0, 1\]; got -1.0 and 0.1"),
            ({"warmup": 2.0}, "got 0.0 and 2.0"),
        ],
    )
    def test_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(UsageError, match=told):
            Distillation(**options)

    def test_held_out_tokens_are_needed(self) -> None:
        tokens = FFNTokens(4)
        tokens.add(drawn(4, D_MODEL), None, held_out=False)
        with pytest.raises(UsageError, match="needs tokens to fit and held-out ones; got 4 of 4"):
            distill(tokens, narrowed(dense()), silu, FAST, damping=1e-2)
