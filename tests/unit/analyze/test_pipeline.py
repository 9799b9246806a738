"""Pipelines on tiny models: parity with an independent computation, laws of the default mode, users' own classes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import ffnscope as fs
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import NonFiniteError, UsageError
from tiny import D_FF, HIDDEN, LAYERS, tiny, tokens
from tiny_moe import EXPERT, tiny_moe

SCORERS = [
    fs.NormScorer(1),
    fs.ActivationScorer(),
    fs.WandaScorer(),
    fs.WeightedPageRankScorer(0.7, 0.4),
    fs.ModifiedPageRankScorer(),
    fs.ModifiedPageRankScorer(z_importance=True, sparsity=0.5),
]
PIPELINES = [fs.IsolatedFFNPipeline, fs.ChainedFFNPipeline]
named = pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__ + str(getattr(s, "z_importance", "")))
piped = pytest.mark.parametrize("pipeline", PIPELINES)


def windows(n=4, length=16):
    return contiguous_windows(tokens(n, length), "random tokens")


def linears(model, arch):
    """(up, down) modules of every FFN."""
    if arch == "gpt2":
        return [(b.mlp.c_fc, b.mlp.c_proj) for b in model.transformer.h]
    return [(b.mlp.up_proj, b.mlp.down_proj) for b in model.model.layers]


def observed(model, modules):
    """|W| [out, in] and norms of inputs and outputs of each module over all tokens, by hooks."""
    rows = {}

    def hook(module, args, output):
        rows[module] = [np.sqrt((t.double().flatten(0, -2) ** 2).sum(0).numpy()) for t in (args[0], output)]

    handles = [m.register_forward_hook(hook) for m in modules]
    with torch.no_grad():
        model(input_ids=tokens(4, 16))
    for handle in handles:
        handle.remove()
    conv = {m: type(m).__name__ == "Conv1D" for m in modules}
    return [(np.abs((m.weight.T if conv[m] else m.weight).detach().double().numpy()), *rows[m]) for m in modules]


def reference_score(scorer, p, w, inp, out):
    """The formulas of LLM-Rank in numpy."""
    if isinstance(scorer, fs.NormScorer):
        return w.sum(1)
    if isinstance(scorer, fs.ActivationScorer):
        return out
    if isinstance(scorer, fs.WandaScorer):
        return w @ inp
    if isinstance(scorer, fs.WeightedPageRankScorer):
        b = (w != 0) * 1.0
        matrix = scorer.theta * w / w.sum(0) + (1 - scorer.theta) * b / b.sum(0)
        return scorer.gamma * matrix @ p + (1 - scorer.gamma) * out / out.sum()
    p = p.copy()
    if scorer.z_importance:
        p[np.argsort(p)[: int(len(p) * scorer.sparsity)]] = 0
    return out * (w @ p)


def reference(scorer, matrices):
    previous, found = matrices[0][1], []
    for w, inp, out in matrices:
        r = reference_score(scorer, previous / previous.sum(), w, inp, out)
        previous = r / r.sum()
        found.append(previous)
    return found


@piped
@named
@pytest.mark.parametrize("arch", ["llama", "llama_bias", "gpt2"])
def test_layerwise_is_the_public_formula_on_a_model(arch, scorer, pipeline):
    model = tiny(arch)
    pairs = linears(model, arch)
    chained = pipeline is fs.ChainedFFNPipeline
    groups = [[m for pair in pairs for m in pair]] if chained else [list(pair) for pair in pairs]
    expected = [v for group in groups for v in reference(scorer, observed(model, group))]
    result = pipeline(model, windows(), scorer, fs.LocalPruner(0.25), layerwise=True).run()
    for i, site in enumerate(result.scores.sites):
        assert result.scores.values[site].numpy() == pytest.approx(expected[2 * i], abs=1e-6)
        assert result.residual_scores[site].numpy() == pytest.approx(expected[2 * i + 1], abs=1e-6)
        assert int(result.residual_masks[site].sum()) == HIDDEN * 3 // 4
    assert set(result.plan.widths.values()) == {D_FF * 3 // 4}


def channel_reference(scorer, model, arch, chained):
    """The default mode in numpy: scores of the channels of every FFN."""
    found, previous = [], None
    for i, (up, down) in enumerate(linears(model, arch)):
        (u, x, _), (d, h, y) = observed(model, [up, down])
        rows = [u] if arch == "gpt2" else [u, observed(model, [model.model.layers[i].mlp.gate_proj])[0][0]]
        shares = np.mean([w / w.sum(1, keepdims=True) for w in rows], axis=0)
        write = h / 8 * np.sqrt((d**2).sum(0))  # 8^2 tokens
        p = x if previous is None or not chained else previous
        p, mpr = p / p.sum(), isinstance(scorer, fs.ModifiedPageRankScorer)
        r = reference_score(scorer, p, shares if mpr else shares * write[:, None], x / 8, write)
        found.append(r if mpr or isinstance(scorer, fs.ActivationScorer) else r * write.sum())
        unit = d / np.sqrt((d**2).sum(0))
        previous = reference_score(scorer, r / r.sum(), unit, write, y / 8)
    return found


@piped
@pytest.mark.parametrize(
    "scorer",
    [s for s in SCORERS if not isinstance(s, fs.NormScorer | fs.WandaScorer)],
    ids=lambda s: type(s).__name__ + str(getattr(s, "z_importance", "")),
)
@pytest.mark.parametrize("arch", ["llama", "llama_bias", "gpt2"])
def test_the_default_mode_by_another_way(arch, scorer, pipeline):
    model = tiny(arch)
    expected = channel_reference(scorer, model, arch, pipeline is fs.ChainedFFNPipeline)
    found = pipeline(model, windows(), scorer, fs.LocalPruner(0.25)).run().scores
    for site, value in zip(found.sites, expected, strict=True):
        assert found.values[site].numpy() == pytest.approx(value, rel=1e-4)


@piped
def test_global_is_over_one_chain(pipeline):
    model = tiny("llama")
    run = pipeline(model, windows(), fs.ActivationScorer(), fs.GlobalPruner(0.2), layerwise=True).run()
    removed = [int((~run.plan.mask(s)).sum() + (~run.residual_masks[s]).sum()) for s in run.scores.sites]
    per_chain = -(-(D_FF + HIDDEN) * 2 // 10)
    assert sum(removed) == (LAYERS * per_chain if pipeline is fs.IsolatedFFNPipeline else 32)
    if pipeline is fs.IsolatedFFNPipeline:
        assert removed == [per_chain] * LAYERS
    # every matrix has mass 1, so the wider one loses: the fault that the mode reproduces
    assert all(run.residual_masks[s].float().mean() >= run.plan.mask(s).float().mean() for s in run.scores.sites)


METRICS_OF = [
    (fs.NormScorer(3), "magnitude", {"p": 3.0}, ""),
    (fs.ActivationScorer(), "write_norm", {}, ""),
    (fs.WandaScorer(), "wanda", {}, ""),
    (fs.WeightedPageRankScorer(0.7, 0.4), "weighted_pagerank", {"gamma": 0.7, "theta": 0.4}, "_chained"),
    (fs.ModifiedPageRankScorer(True, 0.5), "modified_pagerank", {"z_importance": True, "sparsity": 0.5}, "_chained"),
]
LAYERWISE_OF = [
    (fs.NormScorer(3), "layerwise_norm", {"p": 3.0}, ""),
    (fs.ActivationScorer(), "layerwise_activation", {}, ""),
    (fs.WandaScorer(), "layerwise_wanda", {}, ""),
    (fs.WeightedPageRankScorer(0.7, 0.4), "layerwise_weighted_pagerank", {"gamma": 0.7, "theta": 0.4}, "_chained"),
    (
        fs.ModifiedPageRankScorer(True, 0.5),
        "layerwise_modified_pagerank",
        {"z_importance": True, "sparsity": 0.5},
        "_chained",
    ),
]


@piped
@pytest.mark.parametrize("row", [*METRICS_OF, *LAYERWISE_OF], ids=lambda r: r[1])
@pytest.mark.parametrize("arch", ["llama_bias", "gpt2"])
def test_metrics_are_the_pipelines(arch, row, pipeline):
    scorer, name, params, suffix = row
    model = tiny(arch)
    layerwise = name.startswith("layerwise")
    found = pipeline(model, windows(), scorer, fs.LocalPruner(0.25), layerwise=layerwise).run().scores
    metric = name + (suffix if pipeline is fs.ChainedFFNPipeline else "")
    expected = fs.score(model, fs.calibrate(model, windows(), {metric: params}), metric, **params)
    for site, value in expected.values.items():
        assert torch.allclose(found.values[site], value, rtol=1e-5, atol=0)


def run(model, scorer, pipeline=fs.ChainedFFNPipeline, **options):
    return pipeline(model, windows(), scorer, fs.LocalPruner(0.25), **options).run()


@torch.no_grad()
def rescaled(model):
    """The same function with other units between up and down."""
    other = copy.deepcopy(model)
    c = torch.linspace(-3, 3, D_FF).exp2()
    for up, down in linears(other, "llama"):
        up.weight.mul_(c[:, None])
        down.weight.div_(c)
    return other


@piped
@named
def test_the_default_mode_does_not_see_units(scorer, pipeline):
    model = tiny("llama")
    before, after = (run(m, scorer, pipeline).scores for m in (model, rescaled(model)))
    for site in before.sites:
        assert torch.allclose(before.values[site], after.values[site], rtol=1e-4)


@piped
@named
def test_the_layerwise_mode_does(scorer, pipeline):
    model = tiny("llama")
    before, after = (run(m, scorer, pipeline, layerwise=True).scores for m in (model, rescaled(model)))
    assert not any(torch.allclose(before.values[site], after.values[site], rtol=0.05) for site in before.sites)


@torch.no_grad()
def with_dead_channel(how):
    """Channel 5 has a down column of zeros, or a gate that is never open."""
    model = tiny("llama_relu", mlp_bias=True)
    for block in model.model.layers:
        if how == "down":
            block.mlp.down_proj.weight[:, 5] = 0
        else:
            block.mlp.gate_proj.bias[5] = -1000.0
    return model


@piped
@named
@pytest.mark.parametrize("how", ["down", "gate"])
def test_a_channel_without_effect_gets_zero(scorer, pipeline, how):
    model = with_dead_channel(how)
    found = run(model, scorer, pipeline)
    only_weights = isinstance(scorer, fs.NormScorer) and how == "gate"
    for site, value in found.scores.values.items():
        assert bool(value[5] == 0) is not only_weights
        assert (value[torch.arange(D_FF) != 5] > 0).all()
        assert only_weights or 5 not in found.plan.kept[site].tolist()
    blind = run(model, scorer, pipeline, layerwise=True).scores
    assert all(value[5] > 0 for value in blind.values.values())


def test_gamma_zero_is_the_activation():
    model = tiny("llama")
    for layerwise in (False, True):
        a, b = (
            run(model, s, layerwise=layerwise).scores for s in (fs.ActivationScorer(), fs.WeightedPageRankScorer(0))
        )
        assert all(torch.allclose(a.values[s], b.values[s], rtol=1e-5) for s in a.sites)


def test_the_chain_matters():
    model = tiny("llama")
    for scorer in (fs.WeightedPageRankScorer(), fs.ModifiedPageRankScorer()):
        one, chain = (run(model, scorer, p).scores for p in PIPELINES)
        first, second = one.sites
        assert torch.equal(one.values[first], chain.values[first])
        assert not torch.allclose(one.values[second], chain.values[second], rtol=1e-3)


def test_random_is_seeded_and_leaves_torch_alone():
    model = tiny("llama")
    state = torch.get_rng_state()
    pipeline = fs.IsolatedFFNPipeline(model, windows(), fs.RandomScorer(seed=3), fs.LocalPruner(0.25))
    first, again = pipeline.run(), pipeline.run()
    assert torch.equal(state, torch.get_rng_state())
    a, b = first.scores.sites
    assert torch.equal(first.scores.values[a], again.scores.values[a])
    assert not torch.equal(first.scores.values[a], first.scores.values[b])
    other = run(model, fs.RandomScorer(seed=4))
    assert not torch.equal(first.scores.values[a], other.scores.values[a])
    assert first.scores.facts["params"] == {"seed": 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@named
def test_half_precision(scorer, dtype):
    model = tiny("llama", dtype=dtype)
    for layerwise in (False, True):
        low = run(model, scorer, layerwise=layerwise).scores
        high = run(copy.deepcopy(model).float(), scorer, layerwise=layerwise).scores
        assert all(torch.allclose(low.values[s], high.values[s], rtol=0.05) for s in low.sites)


class Loudest(fs.BaseScorer):
    """A subclass as LLM-Rank's users write it: its arguments in its order, a device, and one of them changed."""

    def __init__(self, device="cpu", power=2):
        super().__init__(device)
        self.power = power

    def score(self, prev_importance, in_activations, out_activations, weight):
        prev_importance[0] = 0
        weight.mul_(1.0)
        return (weight.matmul(prev_importance) * out_activations) ** self.power


class Renamed(fs.BaseScorer):
    def score(self, p, inputs, outputs, w):
        return w @ p + 0 * inputs.sum() + 0 * outputs


class Thirds(fs.BasePruner):
    """Only sets ``pruning_mask`` and ``amount`` on what it is given."""

    def extract_scores(self, layer_list):
        for layer in layer_list:
            layer.pruning_mask = layer.importance.unsqueeze(1).repeat(1, layer.in_features)
            layer.amount = layer.out_features // 3


@piped
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("scorer", [Loudest(), Renamed()], ids=lambda s: type(s).__name__)
def test_own_scorer_and_pruner(scorer, layerwise, pipeline):
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    result = pipeline(model, windows(), scorer, Thirds(0.9), layerwise=layerwise).run()
    assert set(result.plan.widths.values()) == {D_FF - D_FF // 3}
    assert (result.plan.metric, result.plan.allocator) == (type(scorer).__name__, "Thirds")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with fs.masked(model, result.plan):
        assert fs.perplexity(model, windows()).value > 0
    assert result.scores.facts["params"] == ({"device": "cpu", "power": 2} if isinstance(scorer, Loudest) else {})


def test_a_scorer_that_returns_what_cannot_be():
    class Wrong(fs.BaseScorer):
        value = torch.ones(3)

        def score(self, prev_importance, in_activations, out_activations, weight):
            return self.value

    model = tiny("llama")
    with pytest.raises(UsageError, match=r"Wrong.score returned shape \(3,\); expected \(48,\), one per output"):
        run(model, Wrong())
    Wrong.value = -torch.ones(D_FF)
    with pytest.raises(UsageError, match=r"Wrong.score returned a value that is negative, NaN or infinite"):
        run(model, Wrong())
    with pytest.raises(NotImplementedError, match=r"BaseScorer has no score\(self, prev_importance, in_activations"):
        run(model, fs.BaseScorer())


def test_own_chains():
    class Pairs(fs.BasePipeline):
        keep = 1

        def chains(self, steps):
            return [steps[: self.keep], steps[1:]]

    model = tiny("llama")
    assert run(model, fs.WeightedPageRankScorer(), Pairs).plan.sparsity == 0.25
    Pairs.keep = 2
    with pytest.raises(UsageError, match=r"Pairs.chains must hold every FFN once; model.layers.1.mlp is missing"):
        run(model, fs.WeightedPageRankScorer(), Pairs)
    with pytest.raises(NotImplementedError, match="BasePipeline has no chains"):
        run(model, fs.WeightedPageRankScorer(), fs.BasePipeline)


def test_tracked_ffns_alone():
    model = tiny("llama")
    found = run(model, fs.WeightedPageRankScorer(), tracked=["model.layers.1.mlp"])
    assert [s.layer for s in found.plan.kept] == [1]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
@piped
@named
def test_experts(name, scorer, pipeline):
    model = tiny_moe(name)
    text = contiguous_windows(tokens(8, 32), "random tokens")
    for layerwise in (False, True):
        result = pipeline(model, text, scorer, fs.LocalPruner(0.25), layerwise=layerwise).run()
        widths = {site.d_ff: width for site, width in result.plan.widths.items()}
        assert widths[EXPERT] == EXPERT * 3 // 4
        assert all(v.isfinite().all() for v in result.scores.values.values())


def test_an_expert_without_tokens_is_left_whole():
    model = tiny_moe("mixtral")
    text = contiguous_windows(torch.full((1, 4), 7), "one token")
    with pytest.warns(UserWarning, match="were reached by no calibration token.*so WeightedPageRankScorer cannot rank"):
        found = fs.ChainedFFNPipeline(model, text, fs.WeightedPageRankScorer(), fs.LocalPruner(0.25)).run()
    names = found.scores.facts["unreached"]
    assert names
    for site, width in found.plan.widths.items():
        assert width == (EXPERT if site.name in names else EXPERT * 3 // 4)


@pytest.mark.parametrize("metric", ["write_norm", "weighted_pagerank_chained"])
def test_a_weight_that_is_not_finite_is_named(metric):
    model = tiny("llama")
    stats = fs.calibrate(model, windows(), [metric])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"out_activations that is NaN.* The weight model.layers.1.mlp.down_proj"):
        fs.score(model, stats, metric)
