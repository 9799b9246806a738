"""Sums over batches: which rows count, how parts are joined, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.rows import TokenRows
from ffnscope.errors import LayoutError, UnknownNameError, UsageError
from ffnscope.registry import STATISTICS
from ffnscope.rules import SIGNALS, Statistic
from ffnscope.types import FFNSite

SITE = FFNSite(0, "layers.0.mlp", None, "up", "down", 2, 3)
OTHER = FFNSite(1, "layers.1.mlp", None, "up", "down", 2, 3)
FULL = torch.ones(2, 6, dtype=torch.bool)


def signal(rows=2, length=6, seed=0, dtype=torch.float32):
    return torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def accumulated(names, *batches):
    sums = Accumulator([SITE], names)
    for valid, h in batches:
        sums.begin(valid, int(valid[:, 1:].sum()))
        sums.observe(SITE, h)
    return sums.result()[SITE]


def observed(sums, *batches):
    for valid, signals in batches:
        sums.begin(valid, int(valid[:, 1:].sum()))
        for name in SIGNALS:
            if name in signals:
                sums.observe_signal(SITE, name, signals[name])
    return sums.result()[SITE]


@pytest.fixture
def largest(monkeypatch):
    """A statistic that is a maximum; the built-in ones are sums."""
    item = Statistic("largest", lambda h: h.abs().amax(0), ("h",), "max", ("d_ff",), 1, "Largest |h|.")
    monkeypatch.setitem(STATISTICS._items, "largest", item)
    return "largest"


def test_rows_without_padding_are_a_view():
    h = signal()
    assert TokenRows(FULL).take(SITE, h).data_ptr() == h.data_ptr()


def test_padding_is_never_read():
    h = signal()
    valid = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    h[~valid] = float("nan")
    rows = TokenRows(valid).take(SITE, h)
    assert torch.equal(rows, torch.cat([h[0, :5], h[1, :2]]))


def test_every_kth_token_counts_from_the_start_of_each_window():
    h = signal(2, 6)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(TokenRows(FULL).take(SITE, h, 4), torch.stack([h[0, 0], h[0, 4], h[1, 0], h[1, 4]]))
    assert torch.equal(TokenRows(valid).take(SITE, h, 4), torch.stack([h[0, 0], h[0, 4], h[1, 0]]))


def test_tokens_that_the_model_flattened():
    h = signal()
    valid = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    for mask in (FULL, valid):
        for every in (1, 4):
            rows = TokenRows(mask)
            assert torch.equal(rows.take(SITE, h.flatten(0, 1), every), rows.take(SITE, h, every))


def test_a_signal_of_other_tokens_is_refused():
    with pytest.raises(LayoutError, match=r"layers.0.mlp was given 5 rows for a batch of \(2, 6\) = 12 tokens"):
        TokenRows(FULL).take(SITE, signal()[0, :5])


def test_sums_are_float64_and_counts_int32():
    part = accumulated(["act_sq", "act_hist"], (FULL, signal(dtype=torch.bfloat16)))
    assert part.values["act_sq"].dtype == torch.float64
    assert part.values["act_hist"].dtype == torch.int32
    assert part.counts == {"act_sq": 12, "act_hist": 2}


def test_low_precision_signals_are_summed_in_float32():
    h = torch.full((1, 3000, 3), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    part = accumulated(["act_sum"], (torch.ones(1, 3000, dtype=torch.bool), h))
    assert part.total("act_sum").tolist() == [3000.0] * 3


def test_float64_signals_are_not_rounded():
    h = torch.full((2, 6, 3), 1 + 1e-12, dtype=torch.float64)
    assert accumulated(["act_sum"], (FULL, h)).total("act_sum")[0].item() == pytest.approx(12 + 12e-12, abs=1e-14)


def test_sums_add_and_maxima_do_not(largest):
    first, second = signal(seed=1), signal(seed=2)
    part = accumulated(["act_abs", largest], (FULL, first), (FULL, second))
    both = torch.cat([first, second]).abs().flatten(0, 1).double()
    assert torch.allclose(part.total("act_abs"), both.sum(0), rtol=1e-6)
    assert torch.equal(part.total(largest), both.amax(0))
    assert part.reductions == {"act_abs": "sum", largest: "max"}


def test_a_statistic_may_return_a_view_of_its_signal(monkeypatch):
    item = Statistic("first", lambda h: h[0], ("h",), "sum", ("d_ff",), 1, "The first row.")
    monkeypatch.setitem(STATISTICS._items, "first", item)
    h = signal(dtype=torch.float64)
    before = h.clone()
    part = accumulated(["first"], (FULL, h), (FULL, h))
    assert torch.equal(h, before)
    assert torch.equal(part.total("first"), 2 * before[0, 0])


def test_gradients_are_divided_by_the_predicted_tokens():
    sums = Accumulator([SITE], ["grad_sq", "taylor_abs", "act_sq"])
    h, g = signal(seed=1), signal(seed=2)
    sums.begin(FULL, 7)
    sums.observe_gradient(SITE, h, g)
    part = sums.result()[SITE]
    assert part.counts == {"grad_sq": 7, "taylor_abs": 7}
    assert torch.allclose(part.mean("taylor_abs"), (h * g).abs().double().sum((0, 1)) / 7, rtol=1e-6)


def test_the_result_is_a_copy_that_autograd_can_use():
    sums = Accumulator([SITE], ["act_sq"])
    with torch.inference_mode():
        sums.begin(FULL, 10)
        sums.observe(SITE, signal())
    first = sums.result()[SITE].total("act_sq")
    before = first.clone()
    with torch.inference_mode():
        sums.observe(SITE, signal(seed=1))
    assert torch.equal(first, before)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (first * weight).sum().backward()
    assert torch.equal(weight.grad, before)


def test_sums_take_memory_of_the_width_whatever_the_text():
    sizes = []
    for length in (8, 800):
        part = accumulated(
            ["act_sum", "act_abs", "act_sq", "act_hist"],
            *[(torch.ones(2, length, dtype=torch.bool), signal(2, length)) for _ in range(3)],
        )
        sizes.append(sum(v.untyped_storage().nbytes() for v in part.values.values()))
    assert sizes == [3 * (8 * 3 + 4 * 128)] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("names", [["act_sq"], ["act_hist"], ["act_sum", "act_hist"]])
def test_the_first_site_that_is_not_finite(names, bad):
    sums = Accumulator([SITE, OTHER], names)
    sums.begin(FULL, 10)
    sums.observe(SITE, signal())
    sums.observe(OTHER, signal())
    assert sums.first_not_finite() is None
    h = signal()
    h[1, 0, 2] = bad  # the histogram reads the first token of each window, and every 32nd after
    sums.observe(OTHER, h)
    assert sums.first_not_finite() == OTHER
    sums.observe(SITE, h)
    assert sums.first_not_finite() == SITE


def test_a_bad_gradient_is_looked_for_from_the_last_site():
    sums = Accumulator([SITE, OTHER], ["grad_sq"])
    sums.begin(FULL, 10)
    bad = signal().fill_(float("inf"))
    for site in (SITE, OTHER):
        sums.observe_gradient(site, signal(), bad)
    assert sums.first_not_finite() == OTHER


def test_a_bad_value_in_one_signal_is_not_forgotten_for_another(monkeypatch):
    """Counts cannot show NaN, so the signals are looked at; each of them."""
    for name in ("h", "g"):
        item = Statistic(f"count_{name}", lambda v: (v > 0).sum(0), (name,), "sum", ("d_ff",), 1, "Positive.")
        monkeypatch.setitem(STATISTICS._items, item.name, item)
    sums = Accumulator([SITE], ["count_h", "count_g"])
    bad = signal()
    bad[0, 0, 0] = float("nan")
    observed(sums, (FULL, {"h": bad, "g": signal()}))
    assert sums.first_not_finite() == SITE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("names", [["x_outer"], ["x_sum"], ["xh_outer"], ["xh_outer", "act_hist"]])
def test_bad_matrices_are_found(names, bad):
    sums = Accumulator([SITE], names)
    x, h = signal()[..., :2], signal(seed=1)
    observed(sums, (FULL, {"x": x, "h": h}))
    assert sums.first_not_finite() is None
    x[0, 0, 0] = bad
    observed(sums, (FULL, {"x": x, "h": h}))
    assert sums.first_not_finite() == SITE


def test_matrices_over_batches():
    core = torch.tensor([2, 0])
    names = ["x_sum", "x_outer", "xh_outer", "h_outer", "taylor_sum", "taylor_core"]
    valid = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    batches, rows = [], []
    for i, mask in enumerate((FULL, valid)):
        x, h, g = (signal(seed=10 * i + k, dtype=torch.float64) for k in range(3))
        x = x[..., :2].clone()
        for one in (x, h, g):
            one[~mask] = float("nan")  # padding is never read
        batches.append((mask, {"x": x, "h": h, "g": g}))
        rows.append([one[mask] for one in (x, h, g)])
    sums = Accumulator([SITE], names, {SITE: core})
    for mask, signals in batches:
        sums.begin(mask, int(mask[:, 1:].sum()))
        sums.observe_signal(SITE, "x", signals["x"])
        sums.observe(SITE, signals["h"])
        sums.observe_gradient(SITE, signals["h"], signals["g"])
    part = sums.result()[SITE]
    x, h, g = (torch.cat(one) for one in zip(*rows, strict=True))
    q = h * g
    expected = {
        "x_sum": x.sum(0),
        "x_outer": torch.einsum("ni,nj->ij", x, x),
        "xh_outer": torch.einsum("ni,nj->ij", x, h),
        "h_outer": torch.einsum("ni,nj->ij", h, h),
        "taylor_sum": q.sum(0),
        "taylor_core": torch.einsum("ni,nj->ij", q[:, core], q),
    }
    for name, value in expected.items():
        assert torch.allclose(part.total(name), value, rtol=1e-12, atol=1e-14), name
        assert part.counts[name] == (15 if name.startswith("taylor") else 19)


def test_which_signals_a_batch_needs():
    sums = Accumulator([SITE], ["act_sq", "xh_outer", "taylor_sq"])
    for passes, signals, reads in (
        ({}, ("x",), True),
        ({"backward": False}, ("x",), True),
        ({"forward": False}, (), False),  # g brings h again
    ):
        sums.begin(FULL, 10, **passes)
        assert (sums.signals, sums.reads_activation) == (signals, reads)


def test_sums_outlive_inference_mode(largest):
    """A batch without gradients may come before one with; both add to the same sums."""
    sums = Accumulator([SITE], ["act_sq", "act_hist", largest])
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            sums.begin(FULL, 10)
            sums.observe(SITE, signal())
    part = sums.result(copy=False)[SITE]
    assert not any(v.is_inference() for v in part.values.values())
    once = accumulated(["act_sq", "act_hist", largest], (FULL, signal()))
    assert torch.allclose(part.total("act_sq"), 3 * once.total("act_sq"))
    assert torch.equal(part.total(largest), once.total(largest))


def test_sums_that_are_not_copied_go_on_changing():
    sums = Accumulator([SITE], ["act_sq"])
    sums.begin(FULL, 10)
    sums.observe(SITE, signal())
    same = sums.result(copy=False)[SITE].total("act_sq")
    before = same.clone()
    sums.observe(SITE, signal())
    assert torch.allclose(same, 2 * before)


def test_a_statistic_keeps_the_shape_that_it_declares(monkeypatch):
    item = Statistic("square", lambda h: h.T @ h, ("h",), "sum", ("d_model", "d_ff"), 1, "Of another shape.")
    monkeypatch.setitem(STATISTICS._items, "square", item)
    text = r"'square' returned \(3, 3\) for layers.0.mlp; expected \(2, 3\) = \('d_model', 'd_ff'\)"
    with pytest.raises(UsageError, match=text):
        accumulated(["square"], (FULL, signal()))


def test_memory_of_all_sums_is_taken_at_once():
    """Else the values of matrices, which come and go between them, would leave holes of half their size."""
    names = ["act_sq", "act_hist", "h_outer", "taylor_sum"]
    sums = Accumulator([SITE, OTHER], names)
    sums.begin(FULL, 10)
    sums.observe(SITE, signal())
    reserved = {key: place.data_ptr() for key, place in sums.sums.places.items()}
    assert {*reserved} == {(SITE, "taylor_sum"), *((OTHER, n) for n in names)}
    sums.observe(OTHER, signal())
    found = sums.result(copy=False)[OTHER]
    assert {n: v.data_ptr() for n, v in found.values.items()} == {n: reserved[OTHER, n] for n in names[:3]}
    assert {*sums.result()[SITE].values} == {*names[:3]}  # what never began is not there


def test_restore_continues():
    names = ["act_sq", "act_hist"]
    half = accumulated(names, (FULL, signal(seed=1)))
    sums = Accumulator([SITE], names)
    sums.restore([half])
    sums.begin(FULL, 10)
    sums.observe(SITE, signal(seed=2))
    whole = accumulated(names, (FULL, signal(seed=1)), (FULL, signal(seed=2)))
    part = sums.result()[SITE]
    assert part.counts == whole.counts
    assert all(torch.equal(part.values[n], whole.values[n]) for n in names)
    assert half.counts["act_sq"] == 12  # what was restored from is left alone
    assert torch.equal(half.total("act_sq"), accumulated(names, (FULL, signal(seed=1))).total("act_sq"))


def test_refusals(monkeypatch):
    with pytest.raises(UnknownNameError, match=r"Unknown statistic 'act_sqr'. Did you mean 'act_sq'"):
        Accumulator([SITE], ["act_sqr"])
    item = Statistic("sparse_g", lambda g: g.sum(0), ("g",), "sum", ("d_ff",), 4, "Every 4th gradient.")
    monkeypatch.setitem(STATISTICS._items, "sparse_g", item)
    with pytest.raises(UsageError, match=r"'sparse_g' reads gradients of every 4th token.*register it with every=1"):
        Accumulator([SITE], ["sparse_g"])
