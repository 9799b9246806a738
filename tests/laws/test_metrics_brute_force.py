"""Every metric against another way to the same number: numpy on raw signals, refits, ablations, finite differences."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from ffnscope.calibrate.observe import sum_nll
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import top_core
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from reference import calibrate_in_two, exact, padded, slow_signals_of_all

# gated, gated and fused, plain with flattened tokens, plain transposed
LAYOUTS = ["llama", "phi3", "opt", "gpt2"]
LENGTHS = [16, 5, 16, 2, 11, 9, 16, 16]
N, TARGETS = sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)
CHANNELS = (0, 7, 47)


class Case:
    """A tiny float64 model, its statistics, and the raw signals and weights of its last site as numpy arrays."""

    def __init__(self, arch):
        self.model, self.windows = exact(arch), padded(LENGTHS)
        self.before = exact(arch, seed=1)
        sites = find_sites(self.model)
        loss_proxy = calibrate_in_two(self.model, self.windows, dict.fromkeys(sites, torch.tensor([0])))
        self.core = top_core(score(self.model, loss_proxy, "scar_loss_proxy"), 0.1)
        self.stats = calibrate_in_two(self.model, self.windows, self.core)
        self.site = sites[-1]
        signals = slow_signals_of_all(self.model, sites, self.windows)[self.site]
        self.x, self.h, self.y, self.dy, self.g = (signals[n].numpy() for n in ("x", "h", "y", "dy", "g"))
        self.gate, self.up, self.down = raw_weights(self.model, self.site)
        self.rows = [w for w in (self.gate, self.up) if w is not None]

    def score(self, name, **params):
        found = score(self.model, self.stats, name, core=self.core, reference=self.before, **params)
        return found.values[self.site].numpy()


@cache
def case(arch):
    return Case(arch)


def raw_weights(model, site):
    """gate (or None), up [d_ff, d_model] and down [d_model, d_ff], written out per architecture."""
    inside = model.get_submodule(site.path).named_modules()
    ffn = {name: m.weight.detach().numpy() for name, m in inside if hasattr(m, "weight")}
    if "gate_up_proj" in ffn:
        return ffn["gate_up_proj"][:48], ffn["gate_up_proj"][48:], ffn["down_proj"]
    if "c_fc" in ffn:
        return None, ffn["c_fc"].T, ffn["c_proj"].T
    if "fc1" in ffn:
        return None, ffn["fc1"], ffn["fc2"]
    return ffn["gate_proj"], ffn["up_proj"], ffn["down_proj"]


def information(rho):
    return -0.5 * np.log(1 - np.minimum(rho**2, 1 - 1e-6))


def correlations(cov):
    """From a covariance; a channel that never varies (a dead ReLU) correlates with nothing."""
    variance = np.diag(cov)
    scale = np.sqrt(np.where(variance > 1e-12 * variance.max(), variance, np.inf))
    return cov / np.outer(scale, scale)


every_layout = pytest.mark.parametrize("arch", LAYOUTS)


@every_layout
def test_activation_metrics(arch):
    c = case(arch)
    np.testing.assert_allclose(c.score("activation_l2_norm"), np.sqrt((c.h**2).mean(0)), rtol=1e-9)
    np.testing.assert_allclose(c.score("activation_mean"), np.abs(c.h).mean(0), rtol=1e-9)
    windows = np.split(np.abs(c.h), np.cumsum(LENGTHS)[:-1])
    expected = np.sqrt(sum(w.mean(0) ** 2 for w in windows) / sum(LENGTHS))
    np.testing.assert_allclose(c.score("minitron"), expected, rtol=1e-9)
    np.testing.assert_allclose(c.score("activation_variance"), c.h.var(0), rtol=1e-9)
    norms = np.sqrt((c.h**2).mean(0))
    np.testing.assert_allclose(c.score("wanda"), (np.abs(c.down) * norms).sum(0), rtol=1e-9)


@every_layout
def test_peak_to_peak(arch):
    c = case(arch)
    expected = sum(r.max(1) - np.minimum(r.min(1), -r.min(1)) for r in c.rows)
    np.testing.assert_allclose(c.score("peak_to_peak"), expected, rtol=1e-6)


@every_layout
def test_gradient_power_is_that_of_the_output_along_the_column(arch):
    c = case(arch)
    np.testing.assert_allclose(c.score("scar_curvature"), ((c.dy @ c.down) ** 2).sum(0) / TARGETS, rtol=1e-9)


@every_layout
def test_rayleigh_quotients(arch):
    c = case(arch)
    cov = np.cov(c.x.T, bias=True)

    def quotient(w):
        return np.array([row @ cov @ row / (row @ row) for row in w])

    expected = np.mean([quotient(w) for w in c.rows], axis=0)
    np.testing.assert_allclose(c.score("rayleigh_quotient", relative=False), expected, rtol=1e-9)
    np.testing.assert_allclose(c.score("rayleigh_quotient"), expected / np.trace(cov), rtol=1e-9)
    earlier = [w for w in raw_weights(c.before, c.site) if w is not None][:-1]
    moved = np.mean([quotient(w - v) for w, v in zip(c.rows, earlier, strict=True)], axis=0)
    np.testing.assert_allclose(c.score("delta_alignment"), moved / np.trace(cov), rtol=1e-9)


@every_layout
def test_mutual_information_with_the_first_component_of_the_input(arch):
    c = case(arch)
    _, vectors = np.linalg.eigh(np.cov(c.x.T))
    component = c.x @ vectors[:, -1]
    with np.errstate(invalid="ignore"):
        rho = np.nan_to_num([np.corrcoef(component, c.h[:, j])[0, 1] for j in range(48)])
    expected = information(rho)
    assert np.count_nonzero(expected) > 40
    np.testing.assert_allclose(c.score("mutual_information_gaussian"), expected, rtol=1e-7, atol=1e-12)


@every_layout
def test_redundancies(arch):
    c = case(arch)
    with np.errstate(invalid="ignore"):
        shared = information(np.nan_to_num(np.corrcoef(c.h.T)))
    others = shared - np.diag(np.diag(shared))
    np.testing.assert_allclose(c.score("average_redundancy"), -others.sum(1) / 47, rtol=1e-9)
    one = -c.score("pairwise_redundancy_gaussian", partners=1)
    for j in range(48):
        assert np.abs(np.delete(shared[j], j) - one[j]).min() <= 1e-9 * shared[j].max()
    # the mean of many draws is near that of all other channels
    many = -c.score("pairwise_redundancy_gaussian", partners=4000, seed=3)
    np.testing.assert_allclose(many, others.sum(1) / 47, rtol=0.2)


@every_layout
@pytest.mark.parametrize("damping", [0.01, 1e-4])
def test_sparsegpt_is_the_error_of_an_optimal_refit(arch, damping):
    """Least squares for every other column on the same tokens; the ridge keeps the new columns near the old ones."""
    c = case(arch)
    ridge = damping * (c.h**2).mean()
    root = np.vstack([c.h / np.sqrt(N), np.sqrt(ridge) * np.eye(48)])  # |root w|^2 = E|h w|^2 + ridge |w|^2
    target = root @ c.down.T
    expected = []
    for j in range(48):
        others = np.delete(root, j, axis=1)
        fitted = others @ np.linalg.lstsq(others, target, rcond=None)[0]
        expected.append(((target - fitted) ** 2).sum())
    np.testing.assert_allclose(c.score("sparsegpt", damping=damping), expected, rtol=1e-8)


@every_layout
@pytest.mark.parametrize("name", ["obs", "obs_loss"])
def test_obs_is_the_order_of_greedy_refits(arch, name):
    """Again and again, remove the channel that costs least after least squares of all others on the same tokens."""
    c = case(arch)
    metric = c.dy.T @ c.dy / TARGETS if name == "obs_loss" else np.eye(32)
    ridge = 0.01 * (c.h**2).mean()
    root = np.vstack([c.h / np.sqrt(N), np.sqrt(ridge) * np.eye(48)])
    target = root @ c.down.T
    dead = [int(j) for j in np.flatnonzero((c.h**2).sum(0) == 0)]
    found = c.score(name)
    order = np.argsort(found)
    assert set(order[: len(dead)]) == set(dead) and len(set(found)) == 48

    def error(channels):
        missing = target - root[:, channels] @ np.linalg.lstsq(root[:, channels], target, rcond=None)[0]
        return np.einsum("ni,ij,nj->", missing, metric, missing) / (2 if name == "obs_loss" else 1)

    left, top = [j for j in range(48) if j not in dead], 0.0
    before = error(left)
    for j in order[len(dead) :]:
        errors = {k: error([i for i in left if i != k]) for k in left}
        assert errors[j] <= min(errors.values()) * (1 + 1e-9) + 1e-15
        top = max(top, errors[j] - before)
        np.testing.assert_allclose(found[j], top, rtol=1e-6)
        left.remove(int(j))
        before = errors[j]


@every_layout
def test_flap_is_what_the_mean_in_place_of_the_channel_costs(arch):
    """Mean square change of the output of the real down projection, bias included."""
    c = case(arch)
    down = c.model.get_submodule(c.site.projections[-1])
    expected = []
    with torch.no_grad():
        h = torch.from_numpy(c.h)
        whole = down(h)
        for j in range(48):
            replaced = h.clone()
            replaced[:, j] = h[:, j].mean()
            expected.append(float((down(replaced) - whole).square().sum(1).mean()))
    np.testing.assert_allclose(c.score("flap"), expected, rtol=1e-9)


@every_layout
def test_llm_pruner_is_weight_times_weight_gradient(arch):
    c = case(arch)
    weights = [m.weight for m in map(c.model.get_submodule, c.site.projections)]
    logits = c.model(c.windows.input_ids, attention_mask=c.windows.valid.long(), use_cache=False).logits
    nll = sum_nll(logits, c.windows)
    grads = [(w * g).detach().numpy() for w, g in zip(weights, torch.autograd.grad(nll, weights), strict=True)]
    down = grads[-1].sum(1) if arch == "gpt2" else grads[-1].sum(0)
    np.testing.assert_allclose(c.score("llm_pruner"), np.abs(down) / TARGETS, rtol=1e-8, atol=1e-14)
    if c.gate is not None:  # h is linear in the row of up
        up = grads[-2][-48:].sum(1)
        np.testing.assert_allclose(c.score("llm_pruner"), np.abs(up) / TARGETS, rtol=1e-8, atol=1e-14)


@every_layout
def test_taylor_metrics_are_slopes_of_the_loss(arch):
    """Finite differences of the loss when h_j is scaled at one token; and of all tokens at once, with signs."""
    c = case(arch)
    down, windows = c.model.get_submodule(c.site.projections[-1]), c.windows[3:6]
    stats = calibrate_in_two(c.model, windows, c.core)
    found = {n: score(c.model, stats, n).values[c.site] for n in ("scar_taylor", "scar_loss_proxy", "llm_pruner")}
    width = windows.length

    def loss(channel, tokens, step):
        def scale(module, args):
            h = args[0].clone().view(len(windows), width, -1)
            h[tokens[0], tokens[1], channel] *= 1 + step
            return (h.view_as(args[0]),)

        handle = down.register_forward_pre_hook(scale)
        with torch.no_grad():
            logits = c.model(windows.input_ids, attention_mask=windows.valid.long(), use_cache=False).logits
        handle.remove()
        return float(sum_nll(logits, windows))

    def slope(channel, tokens):
        return (loss(channel, tokens, 1e-4) - loss(channel, tokens, -1e-4)) / 2e-4

    places = windows.valid.nonzero()
    for j in CHANNELS:
        slopes = np.array([slope(j, tuple(place)) for place in places])
        assert float(found["scar_taylor"][j]) == pytest.approx(np.abs(slopes).sum() / windows.n_targets, rel=1e-5)
        proxy = 0.5 * (slopes**2).sum() / windows.n_targets
        assert float(found["scar_loss_proxy"][j]) == pytest.approx(proxy, rel=1e-5)
        together = abs(slope(j, tuple(places.T))) / windows.n_targets
        assert float(found["llm_pruner"][j]) == pytest.approx(together, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("params", [{}, {"halo_fraction": 0.4, "support": 5, "power": 2.0, "floor": 0.05}], ids=str)
@every_layout
def test_supernode_scores(arch, params):
    """The formulas once more, in numpy, from raw signals."""
    c = case(arch)
    chosen = {"halo_fraction": 0.1, "support": 256, "power": 8.0, "floor": 0.2} | params
    core = c.core[c.site].numpy()
    q = c.h * c.g
    proxy = 0.5 * (q**2).sum(0) / TARGETS
    assert set(core) == set(np.argsort(-proxy)[: len(core)])
    size = np.abs(c.down)
    main = np.argsort(-size[:, core].sum(1))[: min(chosen["support"], 16)]
    conn = size[main].sum(0) / size.sum(0)
    outside = np.setdiff1d(np.arange(48), core)
    halo = outside[np.argsort(-conn[outside], kind="stable")][: round(chosen["halo_fraction"] * len(outside))]
    # all tokens with a gradient: the last of each window has q = 0 and is not among the predicted ones
    mean = q.sum(0) / TARGETS
    cov = q.T @ q / TARGETS - np.outer(mean, mean)
    shared = information(np.maximum(correlations(cov)[core][:, halo], 0))
    redundancy = np.sort(shared, axis=0)[::-1][:5].mean(0)
    rank = (rankdata(redundancy) - 1) / (len(halo) - 1)
    protect = np.ones(48)
    protect[halo] = chosen["floor"] + (1 - chosen["floor"]) * (1 - rank ** chosen["power"])
    for name, factor in (
        ("supernode_protection_score", protect),
        ("supernode_connectivity_score", (1 - conn) + conn * protect),
    ):
        expected = proxy * factor
        expected[core] += expected.max()
        np.testing.assert_allclose(c.score(name, **params), expected, rtol=1e-8)


@every_layout
def test_the_last_tokens_have_no_gradient(arch):
    """So sums over all tokens, divided by the predicted ones, are means over the predicted ones."""
    c = case(arch)
    ends = np.cumsum(LENGTHS) - 1
    assert np.abs(c.g[ends]).max() == 0
    assert np.abs(c.dy[ends]).max() == 0


@every_layout
def test_composite(arch):
    c = case(arch)
    parts = {"wanda": 2.0, "scar_loss_proxy": 1.0, "average_redundancy": -0.5}
    values = {n: c.score(n) for n in parts}

    def rank(v):
        return (rankdata(v) - 1) / 47

    def z(v):
        return (v - v.mean()) / v.std()

    for normalise, form in (("rank", rank), ("z", z)):
        expected = sum(w * form(values[n]) for n, w in parts.items()) / 3.5
        found = c.score("composite", parts=parts, normalise=normalise)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_every_metric_is_compared_here_or_by_its_own_test():
    here = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {
        "activation_outlier_index",  # test_histogram.py
        "obs_general",  # test_obs_general.py
        "scar_activation_power",  # the square of activation_l2_norm, by hand
        "scar_loss_proxy_factored",  # a product of two that are here, by hand
        "weight_magnitude",  # test_layouts.py
        "magnitude",
        "random",
    }
    graph = {n for n in METRICS.names() if n == "write_norm" or n.startswith("layerwise_") or "pagerank" in n}
    elsewhere |= graph  # parity/test_llmrank.py, analyze/test_pipeline.py, by hand
    per_site = [name for name in METRICS.names() if METRICS.get(name).scope == "site"]  # others: test_centrality.py
    assert {n for n in per_site if f'"{n}"' not in here} <= elsewhere
