"""Statistics of third parties may read every signal: x, h, y, dy and g, alone and together, on every layout."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate import collect as collecting
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.rules import SIGNALS, Metric, Statistic
from reference import exact, padded, singles, slow_signals_of_all, text
from tiny import tiny

# gated, plain transposed, gated and fused, plain with flattened tokens, plain whose output is added to in place
LAYOUTS = ["llama", "gpt2", "phi3", "opt", "opt_projected", "falcon"]
LENGTHS = [16, 5, 16, 2, 11, 9]
D = {"x": "d_model", "h": "d_ff", "y": "d_model", "dy": "d_model", "g": "d_ff"}
PAIRS = [(a, b) for i, a in enumerate(SIGNALS) for b in SIGNALS[i + 1 :]]


def product(first, second):
    return first.T @ second


def total(signal):
    return signal.sum(0)


def registered(monkeypatch, *reads):
    """One statistic per tuple of signals: a sum of one, a sum of outer products of two; and a metric that needs all."""
    names = []
    for read in reads:
        name = "_".join(("made_up", *read))
        shape = tuple(D[r] for r in read)
        item = Statistic(name, total if len(read) == 1 else product, read, "sum", shape, 1, "Made up.")
        monkeypatch.setitem(STATISTICS._items, name, item)
        names.append(name)
    rule = Metric("made_up", lambda stats, weights: weights.up.sum(1), tuple(names), "test", 1, "test", "Made up.")
    monkeypatch.setitem(METRICS._items, "made_up", rule)
    return dict(zip(names, reads, strict=True))


def check(found, signals, names, counts):
    for site, part in found.items():
        assert {*part.values} == {*names}
        assert not any(v.requires_grad or v.is_inference() for v in part.values.values())
        for name, read in names.items():
            rows = [signals[site][r] for r in read]
            expected = rows[0].sum(0) if len(rows) == 1 else torch.einsum("ti,tj->ij", *rows)
            size = torch.stack([r.square().sum(0).max().sqrt() for r in rows]).prod()
            assert torch.allclose(part.total(name), expected, rtol=1e-9, atol=1e-12 * float(size) * 10), (name, site)
            assert float(expected.abs().max()) > 0
            assert part.counts[name] == counts[bool({"g", "dy"} & set(read))]


@pytest.fixture(autouse=True)
def _all_names():
    STATISTICS.names(), METRICS.names()  # before a test registers its own


@pytest.mark.parametrize("arch", LAYOUTS)
def test_signals_together_are_those_of_slow_autograd(arch, monkeypatch):
    names = registered(monkeypatch, *[(s,) for s in SIGNALS], *PAIRS)
    model, windows = exact(arch), padded(LENGTHS)
    sites = find_sites(model)
    signals = slow_signals_of_all(model, sites, windows)
    for size in (1, 4, 8):
        found = calibrate(model, windows, ["made_up"], sites=sites, options=PassOptions(batch_size=size))
        check(found, signals, names, (sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)))


@pytest.mark.parametrize("reads", [*[(s,) for s in SIGNALS], *PAIRS], ids="-".join)
def test_a_statistic_brings_only_its_own_signals(reads, monkeypatch):
    """Each combination alone: what another statistic asks for must not be what makes it work."""
    names = registered(monkeypatch, reads)
    for arch in ("llama", "falcon"):
        model, windows = exact(arch), padded(LENGTHS)
        sites = find_sites(model)
        found = calibrate(model, windows, ["made_up"], sites=sites)
        counts = (sum(LENGTHS), sum(LENGTHS) - len(LENGTHS))
        check(found, slow_signals_of_all(model, sites, windows), names, counts)


@pytest.mark.parametrize("options", [{"gradient_windows": 2}, {"gradient_length": 7}], ids=str)
def test_gradient_signals_of_some_windows(options, monkeypatch):
    names = registered(monkeypatch, ("x",), ("y",), ("x", "h"), ("h", "dy"), ("y", "dy"), ("x", "g"), ("dy", "g"))
    model, windows = exact("llama"), text(5)
    sites = find_sites(model)
    found = calibrate(model, windows, ["made_up"], sites=sites, options=PassOptions(batch_size=2, **options))
    part = windows[torch.tensor([0, 2])] if "gradient_windows" in options else windows.cut(7)
    whole, some = (slow_signals_of_all(model, sites, w) for w in (windows, part))
    forward = {n: r for n, r in names.items() if not {"g", "dy"} & set(r)}
    for chosen, signals in ((forward, whole), ({n: r for n, r in names.items() if n not in forward}, some)):
        parts = {s: _only(p, chosen) for s, p in found.items()}
        check(parts, signals, chosen, (windows.n_tokens, part.n_targets))


def _only(part, names):
    kept = ({n: getattr(part, f)[n] for n in names} for f in ("values", "counts", "reductions"))
    return type(part)(part.site, *kept)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_padding_counts_in_no_signal(arch, monkeypatch):
    names = registered(monkeypatch, *[(s,) for s in SIGNALS], *PAIRS)
    model, windows = exact(arch), padded([4, 16, 9, 2])
    found = calibrate(model, windows, ["made_up"])
    rows = [calibrate(model, row, ["made_up"]) for row in singles(windows)]
    for site, part in found.items():
        whole = rows[0][site]
        for other in rows[1:]:
            whole = whole.merge(other[site])
        assert part.counts == whole.counts
        for name in names:
            size = float(whole.total(name).abs().max())
            assert torch.allclose(part.total(name), whole.total(name), rtol=1e-10, atol=1e-12 * size), name


def test_the_product_of_h_and_dy_is_the_gradient_of_the_down_projection(monkeypatch):
    names = registered(monkeypatch, ("h", "dy"))
    model, windows = exact("llama"), text(3)
    found = calibrate(model, windows, ["made_up"])
    logits = model(input_ids=windows.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, windows.input_ids[:, 1:].flatten(), reduction="sum").backward()
    for site, part in found.items():
        grad = model.get_submodule(site.projections[-1]).weight.grad
        assert torch.allclose(part.total(next(iter(names))).T, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, monkeypatch):
    names = registered(monkeypatch, *[(s,) for s in SIGNALS], *PAIRS)
    low = calibrate(tiny("llama", dtype=dtype), text(4), ["made_up"])
    full = calibrate(tiny("llama"), text(4), ["made_up"])
    for site, part in full.items():
        for name, read in names.items():
            assert low[site].total(name).dtype == torch.float64
            if len(read) == 2:
                far = (low[site].total(name) - part.total(name)).norm() / part.total(name).norm()
                assert float(far) < 0.2, name


def test_no_signal_is_held_after_its_last_use(monkeypatch):
    """What a batch brings is dropped as soon as no later statistic reads it."""
    registered(monkeypatch, ("x", "h"), ("y",), ("y", "dy"), ("h", "g"))
    kept = []

    class Watched(collecting.Accumulator):
        def observe_signal(self, site, name, value):
            super().observe_signal(site, name, value)
            kept.append((name, tuple(sorted(self._held[site]))))

    monkeypatch.setattr(collecting, "Accumulator", Watched)
    calibrate(exact("llama"), text(1), ["made_up"])
    assert {*kept} == {("x", ("x",)), ("h", ("h",)), ("y", ("h", "y")), ("dy", ("h",)), ("g", ())}


def test_sizes_of_made_up_statistics(monkeypatch):
    names = registered(monkeypatch, ("x", "y"), ("h",))
    model = tiny("llama")
    sites = find_sites(model)
    found = calibrate(model, text(1), ["made_up"], sites=sites)
    size = sum(v.untyped_storage().nbytes() for p in found.values() for v in p.values.values())
    assert statistics_bytes(sites, names) == size == 2 * 8 * (32 * 32 + 48)
