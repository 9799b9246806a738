"""Laws of the calibration pass: what its statistics are, and what they must not depend on."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.scoring import score
from reference import CORE, calibrate_in_two, exact, of_ffns, padded, singles, slow_means, slow_signals, some_core, text
from tiny import tiny, tokens

ALL = METRICS.names()
SCAR = ["scar_activation_power", "scar_taylor", "scar_curvature", "scar_loss_proxy", "scar_loss_proxy_factored"]
# gated, gated and fused, plain with flattened tokens, plain transposed, parallel to attention
LAYOUTS = ["llama", "phi3", "opt", "gpt2", "gpt_neox"]


def close(found, expected, tolerance):
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=0)


def size_of(part, name):
    """The sum of a statistic if its terms did not cancel; by Cauchy-Schwarz where they are products."""
    power = {"x": "x_outer", "h": "h_outer", "d": "dy_outer"}
    pairs = {"x_outer": "xx", "xh_outer": "xh", "h_outer": "hh", "dy_outer": "dd"}
    if name in pairs:
        return torch.outer(*(part.total(power[signal]).diagonal() for signal in pairs[name])).sqrt()
    if name == "x_sum":
        return (part.total("x_outer").diagonal() * part.counts[name]).sqrt()
    if name == "taylor_core":
        return torch.outer(part.total("taylor_sq")[CORE], part.total("taylor_sq")).sqrt()
    return part.total({"act_sum": "act_abs", "taylor_sum": "taylor_abs"}.get(name, name))


def same_stats(found, expected, tolerance):
    for site, part in expected.items():
        assert found[site].counts == part.counts
        for name in part.values.keys() - {"act_hist"}:
            far = (found[site].total(name) - part.total(name)).abs()
            assert bool((far <= tolerance * size_of(part, name)).all()), (site.name, name)


@pytest.mark.parametrize("arch", LAYOUTS)
def test_statistics_are_those_of_slow_autograd(arch):
    model = exact(arch)
    sites = find_sites(model)
    windows = padded([16, 5, 16, 2, 11, 9])
    core = some_core(sites)
    expected = slow_means(model, sites, windows, core)
    found = calibrate_in_two(model, windows, core, batch_size=4)
    known = [STATISTICS.get(name) for name in STATISTICS.names()]
    at_ffns = {s.name for s in known if "ffn" in s.at and not (s.reads_next or "document" in s.reads)}
    assert {*next(iter(expected.values()))} == at_ffns - {"act_hist"}
    for site, means in expected.items():
        for name, value in means.items():
            assert float(value.abs().max()) > 0
            size = size_of(found[site], name) / found[site].counts[name]
            assert bool(((found[site].mean(name) - value).abs() <= 1e-10 * size).all()), (site.name, name)


@pytest.mark.parametrize("arch", LAYOUTS)
@pytest.mark.parametrize("windows", [text(8), padded([16, 3, 9, 16, 7, 2, 12, 15])], ids=["contiguous", "padded"])
def test_batch_size_does_not_matter_in_float32(arch, windows):
    model = tiny(arch)
    core = some_core(find_sites(model))
    one, three, eight = (calibrate_in_two(model, windows, core, batch_size=size) for size in (1, 3, 8))
    same_stats(three, one, 1e-5)
    same_stats(eight, one, 1e-5)
    for site in core:
        part = one[site]
        hist = part.total("act_hist")
        moved = (eight[site].total("act_hist") - hist).abs().sum()
        assert int(moved) <= 0.002 * int(hist.sum())  # values on the edge of a bin


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt_neox"])
def test_padded_rows_are_unpadded_rows(arch):
    model = exact(arch)
    windows = padded([4, 16, 9, 2])
    core = some_core(find_sites(model))
    found = calibrate_in_two(model, windows, core)
    rows = [calibrate_in_two(model, row, core) for row in singles(windows)]
    for site, part in of_ffns(found).items():
        whole = rows[0][site]
        for other in rows[1:]:
            whole = whole.merge(other[site])
        same_stats({site: part}, {site: whole}, 1e-11)
        assert torch.equal(part.total("act_hist"), whole.total("act_hist"))


def test_padding_tokens_do_not_matter():
    model = exact("llama")
    windows = padded([4, 16, 9, 2])
    other = Windows(
        torch.where(windows.valid, windows.input_ids, 7), windows.valid, windows.targets, windows.document, "other pads"
    )
    found, expected = (calibrate_in_two(model, w, some_core(find_sites(model))) for w in (other, windows))
    for site, part in expected.items():
        assert all(torch.equal(found[site].total(n), v) for n, v in part.values.items())


def test_duplicated_text_changes_no_score():
    model = exact("llama")
    ids = tokens(4, 16)
    core, before = some_core(find_sites(model)), exact("llama", seed=1)
    once, twice = (calibrate_in_two(model, contiguous_windows(i, "x"), core) for i in (ids, torch.cat([ids, ids])))
    for name in ALL:
        first, second = (score(model, s, name, core=core, reference=before) for s in (once, twice))
        assert all(close(second.values[s], v, 1e-10) for s, v in first.values.items()), name


def test_halves_merge_to_the_whole():
    model = exact("gpt_neox")
    windows = text(6)
    core = some_core(find_sites(model))
    whole, first, second = (calibrate_in_two(model, w, core) for w in (windows, windows[:2], windows[2:]))
    for site, part in of_ffns(whole).items():
        merged = first[site].merge(second[site])
        assert torch.equal(merged.total("act_hist"), part.total("act_hist"))
        same_stats({site: merged}, {site: part}, 1e-11)


def without_attention():
    """A model whose prediction depends on the current token only, so that windows of any length mean the same."""
    model = exact("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


def chained(ids, length):
    """Windows that overlap by one token: every token of the text but the first is predicted exactly once."""
    starts = range(0, len(ids) - 1, length - 1)
    return contiguous_windows(torch.stack([ids[i : i + length] for i in starts]), f"windows of {length}")


def test_activation_scores_do_not_depend_on_window_length():
    model = without_attention()
    ids = tokens(1, 240)[0]
    scores = [
        score(model, calibrate(model, contiguous_windows(ids.view(-1, n), "x"), ["wanda"]), "wanda") for n in (6, 48)
    ]
    assert all(close(scores[0].values[s], v, 1e-10) for s, v in scores[1].values.items())


@pytest.mark.parametrize("metric", ["scar_taylor", "scar_curvature", "scar_loss_proxy"])
def test_gradient_scores_do_not_depend_on_window_length(metric):
    model = without_attention()
    ids = tokens(1, 241)[0]
    scores = [score(model, calibrate(model, chained(ids, n), [metric]), metric) for n in (5, 25, 61)]
    for other in scores[1:]:
        assert all(close(other.values[s], v, 1e-9) for s, v in scores[0].values.items())


def test_the_gradient_of_a_mean_loss_would_depend_on_window_length():
    """The form that this library avoids: the loss of each window divided by its length."""
    model = without_attention()
    ids = tokens(1, 241)[0]
    site = find_sites(model)[0]

    def biased_loss_proxy(length):
        rows = singles(chained(ids, length))
        parts = [(slow_signals(model, [site], row)[site], row.n_targets) for row in rows]
        total = sum((s["h"] * s["g"] / n).square().sum(0) for s, n in parts)
        return 0.5 * total / sum(n for _, n in parts)

    short, long = biased_loss_proxy(5), biased_loss_proxy(61)
    assert bool((short / long > 100).all())  # (60 / 4)^2 = 225
    fair = score(model, calibrate(model, chained(ids, 5), ["scar_loss_proxy"]), "scar_loss_proxy").values[site]
    assert close(short * 4**2, fair, 1e-9)


def test_a_short_text_among_long_ones_weighs_by_its_tokens():
    model = without_attention()
    windows = padded([3, 16, 16, 16])
    fair = score(model, calibrate(model, windows, ["scar_loss_proxy"]), "scar_loss_proxy")
    for site, value in fair.values.items():
        parts = [slow_signals(model, [site], row)[site] for row in singles(windows)]
        expected = 0.5 * sum((s["h"] * s["g"]).square().sum(0) for s in parts) / (2 + 3 * 15)
        assert close(value, expected, 1e-9)


def test_gradient_windows_are_spread_evenly():
    model = exact("llama")
    windows = text(6)
    found = calibrate(model, windows, ALL, options=PassOptions(batch_size=4, gradient_windows=3))
    forward = calibrate(model, windows, ["wanda", "activation_outlier_index", "activation_variance"])
    backward = calibrate(model, windows[torch.tensor([0, 2, 4])], ["scar_taylor", "scar_curvature", "scar_loss_proxy"])
    for site, part in of_ffns(found).items():
        assert {part.counts[n] for n in ("act_sq", "act_abs", "act_sum")} == {96}
        assert {part.counts[n] for n in ("grad_sq", "taylor_abs", "taylor_sq")} == {45}
        for name, value in {**forward[site].values, **backward[site].values}.items():
            assert torch.allclose(part.total(name).double(), value.double(), rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("gradient_windows", [None, 4])
def test_gradient_length_cuts_only_the_windows_that_run_backward(gradient_windows):
    model = exact("llama")
    windows = padded([16, 5, 16, 12, 3, 16])
    options = PassOptions(batch_size=4, gradient_windows=gradient_windows, gradient_length=8)
    found = calibrate(model, windows, ALL, options=options)
    forward = calibrate(model, windows, ["wanda", "activation_outlier_index", "activation_variance"])
    chosen = {None: [0, 1, 2, 3, 4, 5], 4: [0, 1, 3, 4]}[gradient_windows]
    alone = windows[torch.tensor(chosen)].cut(8)
    backward = calibrate(model, alone, ["scar_taylor", "scar_curvature", "scar_loss_proxy"])
    for site, part in of_ffns(found).items():
        assert part.counts["grad_sq"] == alone.n_targets
        for name, value in {**forward[site].values, **backward[site].values}.items():
            assert torch.allclose(part.total(name).double(), value.double(), rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("options", [PassOptions(), PassOptions(gradient_windows=2), PassOptions(gradient_length=7)])
def test_how_much_runs_backward_does_not_change_the_forward_statistics(options):
    model = exact("gpt2")
    found = calibrate(model, text(6), ["wanda", "scar_loss_proxy"], options=options)
    forward = calibrate(model, text(6), ["wanda"])
    same_stats({s: _only(p, "act_sq") for s, p in of_ffns(found).items()}, forward, 1e-11)


def _only(part, name):
    return type(part)(part.site, {name: part.total(name)}, {name: part.counts[name]}, {name: part.reductions[name]})
