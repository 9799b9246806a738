"""The probe on layers made by hand: what it accepts, and what only looks like an FFN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu, softmax

from ffnscope.ffn.probe import Found, layer_path, probe

WIDTH, CHANNELS = 8, 12
Block = Callable[[Any, Tensor], Tensor]


class Layer(nn.Module):
    """Projections by name, and a function of them that is added to the residual stream."""

    def __init__(self, block: Block, **widths: tuple[int, int]):
        super().__init__()
        self.block = block
        for name, (into, out) in widths.items():
            setattr(self, name, nn.Linear(into, out))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self, x)


class Toy(nn.Module):
    """A language model of two such layers."""

    def __init__(self, block: Block, **widths: tuple[int, int]):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Layer(block, **widths) for _ in range(2))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IN, OUT, DOUBLE = (WIDTH, CHANNELS), (CHANNELS, WIDTH), (WIDTH, 2 * CHANNELS)


def found(block: Block, **widths: tuple[int, int]) -> list[Found]:
    return list(probe(Toy(block, **widths), torch.arange(8)[None]).ffns)


def halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, -1)


ACCEPTED: dict[str, tuple[Block, dict[str, tuple[int, int]], tuple[str | None, str, str, str | None]]] = {
    "gated": (
        lambda m, x: m.c(silu(m.a(x)) * m.b(x)),
        {"a": IN, "b": IN, "c": OUT},
        ("a", "b", "c", None),
    ),
    "gate second": (
        lambda m, x: m.c(m.a(x) * silu(m.b(x))),
        {"a": IN, "b": IN, "c": OUT},
        ("b", "a", "c", None),
    ),
    "relu gate second": (
        lambda m, x: m.c(m.a(x) * relu(m.b(x))),
        {"a": IN, "b": IN, "c": OUT},
        ("b", "a", "c", None),
    ),
    "squared relu gate": (
        lambda m, x: m.c(relu(m.a(x)) ** 2 * m.b(x)),
        {"a": IN, "b": IN, "c": OUT},
        ("a", "b", "c", None),
    ),
    "bilinear": (
        lambda m, x: m.c(m.a(x) * m.b(x)),
        {"a": IN, "b": IN, "c": OUT},
        ("a", "b", "c", None),
    ),
    "clamped up": (
        lambda m, x: m.c(silu(m.a(x)) * (m.b(x).clamp(-1, 1) + 1)),
        {"a": IN, "b": IN, "c": OUT},
        ("a", "b", "c", None),
    ),
    "fused, gate first": (
        lambda m, x: (lambda gate, up: m.c(silu(gate) * up))(*halves(m.a(x))),
        {"a": DOUBLE, "c": OUT},
        ("a", "a", "c", "gate_up"),
    ),
    "fused, up first": (
        lambda m, x: (lambda up, gate: m.c(up * silu(gate)))(*halves(m.a(x))),
        {"a": DOUBLE, "c": OUT},
        ("a", "a", "c", "up_gate"),
    ),
    "fused, relu gate second": (
        lambda m, x: (lambda up, gate: m.c(up * relu(gate)))(*halves(m.a(x))),
        {"a": DOUBLE, "c": OUT},
        ("a", "a", "c", "up_gate"),
    ),
    "plain": (lambda m, x: m.c(silu(m.a(x))), {"a": IN, "c": OUT}, (None, "a", "c", None)),
    "in place": (lambda m, x: m.c(m.a(x).relu_()), {"a": IN, "c": OUT}, (None, "a", "c", None)),
    "scaled": (lambda m, x: m.c(3 * relu(m.a(x)) - 1), {"a": IN, "c": OUT}, (None, "a", "c", None)),
}
REJECTED: dict[str, tuple[Block, dict[str, tuple[int, int]]]] = {
    "a low-rank pair": (lambda m, x: m.c(m.a(x)), {"a": IN, "c": OUT}),
    "a sum": (lambda m, x: m.c(m.a(x) + m.b(x)), {"a": IN, "b": IN, "c": OUT}),
    "a sum of halves": (lambda m, x: m.c(sum(halves(m.a(x)))), {"a": DOUBLE, "c": OUT}),  # type: ignore[arg-type]
    "attention": (
        lambda m, x: m.c(softmax(m.a(x) @ m.b(x).mT, -1) @ m.v(x)),
        {"a": IN, "b": IN, "v": IN, "c": OUT},
    ),
    "a value used twice": (lambda m, x: m.c(h := silu(m.a(x))) + m.d(h), {"a": IN, "c": OUT, "d": OUT}),
    "a value that also leaves": (lambda m, x: m.c(silu(y := m.a(x))) + y[..., :WIDTH], {"a": IN, "c": OUT}),
    "a product with another input": (
        lambda m, x: m.c(silu(m.a(x)) * torch.linspace(1, 2, x.shape[1])[:, None]),
        {"a": IN, "c": OUT},
    ),
    "another width": (lambda m, x: m.c(silu(m.a(x))).mean(-1, keepdim=True) + x, {"a": IN, "c": (CHANNELS, 5)}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    block, widths, (gate, up, down, fused) = ACCEPTED[name]
    expected = [
        Found(path, gate and f"{path}.{gate}", f"{path}.{up}", f"{path}.{down}", fused)  # type: ignore[arg-type]
        for path in ("layers.0", "layers.1")
    ]
    assert found(block, **widths) == expected


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    block, widths = REJECTED[name]
    assert found(block, **widths) == []


def normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (CHANNELS,))


DEPENDENT = "its channels do not each depend on one output of gate and up alone, so none can be removed by itself"
MISSED: dict[str, tuple[Block, dict[str, tuple[int, int]], str]] = {
    "a norm in between": (lambda m, x: m.c(normed(silu(m.a(x)) * m.b(x))), {"a": IN, "b": IN, "c": OUT}, DEPENDENT),
    "mixed channels": (lambda m, x: m.c(silu(m.a(x)).flip(-1)), {"a": IN, "c": OUT}, DEPENDENT),
    "a threshold over all channels": (
        lambda m, x: m.c(relu((y := m.a(x)) - y.mean(-1, keepdim=True))),
        {"a": IN, "c": OUT},
        DEPENDENT,
    ),
    "interleaved halves": (
        lambda m, x: m.c(silu((y := m.a(x))[..., ::2]) * y[..., 1::2]),
        {"a": DOUBLE, "c": OUT},
        DEPENDENT,
    ),
    "a projection that runs twice": (
        lambda m, x: m.c(silu(halves(m.a(x))[0]) * halves(m.a(x))[1]),
        {"a": DOUBLE, "c": OUT},
        DEPENDENT,
    ),
    "three factors": (
        lambda m, x: m.c(silu(m.a(x)) * m.b(x) * m.d(x)),
        {"a": IN, "b": IN, "d": IN, "c": OUT},
        "more than two projections make its channels: layers.0.a, layers.0.b, layers.0.d",
    ),
    "an adapter": (
        lambda m, x: m.c(silu(m.a(x) * m.e(m.d(x)))),
        {"a": IN, "d": (WIDTH, 2), "e": (2, CHANNELS), "c": OUT},
        "layers.0.e (an adapter) changes its gate or up projection in another way than by adding to it",
    ),
}


def test_adapters_that_add() -> None:
    def block(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(silu(m.a(x) + m.e(m.d(x))) * (m.b(x) + m.f(m.d(x))))

    low, high = (WIDTH, 2), (2, CHANNELS)
    (first, _) = found(block, a=IN, b=IN, d=low, e=high, f=high, c=OUT)
    names = tuple(f"layers.0.{n}" for n in "abcef")
    assert first == Found("layers.0", *names[:3], None, None, names[3:])


@pytest.mark.parametrize("name", MISSED)
def test_missed_with_a_reason(name: str) -> None:
    block, widths, reason = MISSED[name]
    seen = probe(Toy(block, **widths), torch.arange(8)[None])
    assert seen.ffns == ()
    assert seen.misses["layers.0.c"] == reason
    assert list(seen.misses) == ["layers.0.c", "layers.1.c"]


@pytest.mark.parametrize("name", sorted(set(REJECTED) - set(MISSED)))
def test_what_is_no_ffn_is_not_told(name: str) -> None:
    block, widths = REJECTED[name]
    assert probe(Toy(block, **widths), torch.arange(8)[None]).misses == {}


def test_a_low_rank_pair_with_a_norm_between_is_not_told() -> None:
    seen = probe(
        Toy(lambda m, x: m.c(nn.functional.layer_norm(m.a(x), (5,))), a=(WIDTH, 5), c=(5, WIDTH)), torch.arange(8)[None]
    )
    assert (seen.ffns, seen.misses) == ((), {})


def test_what_ran() -> None:
    seen = probe(Toy(lambda m, x: m.c(silu(m.a(x))), a=IN, b=IN, c=OUT), torch.arange(8)[None])
    assert seen.ran == {"layers.0.a", "layers.0.c", "layers.1.a", "layers.1.c", "head"}


def test_code_without_gradients() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m.c(silu(m.a(x)))

    assert [f.down for f in found(block, a=IN, c=OUT)] == ["layers.0.c", "layers.1.c"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gated", "gate second", "relu gate second", "squared relu gate", "fused, up first"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    block, widths, _ = ACCEPTED[name]
    ids = torch.arange(8)[None]
    assert list(probe(Toy(block, **widths).to(dtype), ids).ffns) == found(block, **widths)


def test_two_ffns_in_one_layer() -> None:
    names = {"a": IN, "c": OUT, "d": IN, "e": IN, "f": OUT}
    sites = found(lambda m, x: m.c(silu(m.a(x))) + m.f(silu(m.d(x)) * m.e(x)), **names)
    assert [(f.gate, f.up, f.down) for f in sites[:2]] == [
        (None, "layers.0.a", "layers.0.c"),
        ("layers.0.d", "layers.0.e", "layers.0.f"),
    ]
    assert len(sites) == 4


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("model.layers.3.mlp.0", "model.layers.3"),
        ("lm_head", None),
        ("", None),
    ],
)
def test_layer_path(name: str, path: str | None) -> None:
    assert layer_path(name) == path
