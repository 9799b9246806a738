"""Every centrality against a dense solve, networkx or a singular value decomposition of the same small graph."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.metrics import blocks
from ffnscope.metrics.edges import entry_of, seed_of, step_edges
from ffnscope.metrics.sweeps import backward, expected, forward
from ffnscope.plan.build import build_plan
from ffnscope.registry import METRICS
from ffnscope.types import Budget, Scores
from graphs import D_MODEL, TOKENS, Dense, dense, example

STRENGTHS = ("weight", "contribution", "energy", "gradient")
SWEEPS = ("graph_backward", "graph_forward", "graph_flow", "graph_katz", "graph_pagerank", "graph_cheirank")
NAMES = (*SWEEPS, "graph_hub", "graph_authority")


def run(name, one, **params):
    rule = METRICS.get(name)
    given = dict.fromkeys(rule.inputs) | params
    return rule.fn(one.graph, one.stats, **given)


def check(found, one, where: Dense, expected_values, factor=1.0):
    assert list(found) == list(one.graph.sites)
    for site, value in found.items():
        assert torch.allclose(value, expected_values[where.nodes[site]] * factor, rtol=1e-9, atol=1e-300), site.name


def shares(matrix):
    """Columns that sum to 1, or are 0."""
    total = matrix.sum(0, keepdim=True)
    return torch.where(total > 0, matrix / total.clamp_min(1e-300), 0)


def at(place, values, size):
    found = torch.zeros(size, dtype=torch.float64)
    found[place] = values
    return found


def solve(matrix, right):
    return torch.linalg.solve(torch.eye(len(matrix), dtype=torch.float64) - matrix, right)


def seed(one, strength):
    """Mean size of what each residual channel adds to a logit, by its definition."""
    power = 2 if strength == "energy" else 1
    found = one.weights["head"].abs().pow(power).mean(0)
    if strength != "weight":
        found = found * (one.stats[one.graph.head_site].values["stream_sq"] / TOKENS).sqrt() ** power
    return found / found.sum()


def entry(one, strength):
    if strength == "weight":
        return torch.full((D_MODEL,), 1 / D_MODEL, dtype=torch.float64)
    size = (one.stats[one.graph.cuts[0]].values["stream_sq"] / TOKENS).sqrt() ** (2 if strength == "energy" else 1)
    return size / size.sum()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_backward_is_a_dense_solve(strength):
    one = example()
    where = dense(one, strength)
    right = at(where.cuts[-1], seed(one, strength), len(where.strength))
    check(run("graph_backward", one, strength=strength), one, where, solve(where.halves.T, right))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_forward_and_flow_are_dense_solves(strength):
    one = example()
    where = dense(one, strength)
    walk = shares(where.strength)
    visits = solve(walk, at(where.cuts[0], entry(one, strength), len(walk)))
    reward = solve(walk.T, at(where.cuts[-1], seed(one, strength), len(walk)))
    check(run("graph_forward", one, strength=strength), one, where, visits)
    whole = (visits * reward)[where.cuts[-1]].sum()
    check(run("graph_flow", one, strength=strength), one, where, visits * reward / whole)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_katz_is_that_of_networkx(strength):
    one = example()
    where = dense(one, strength)
    alpha = 0.8 / float(where.strength.sum(1).max())
    backwards = nx.from_numpy_array(where.strength.numpy(), create_using=nx.DiGraph)  # from target to source
    found = nx.katz_centrality(backwards, alpha=alpha, normalized=False, weight="weight", tol=1e-15)
    values = torch.tensor([found[i] for i in range(len(found))], dtype=torch.float64)
    scores = run("graph_katz", one, strength=strength, attenuation=0.8)
    for site, value in scores.items():
        assert torch.allclose(value, values[where.nodes[site]] - 1, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("teleport", ["uniform", "activation", "gradient", "contrast"])
@pytest.mark.parametrize("name", ["graph_pagerank", "graph_cheirank"])
def test_pagerank_is_that_of_networkx(name, teleport, strength):
    one, other = example(), example(seed=5)
    where = dense(one, strength)
    matrix = where.strength.T if name == "graph_pagerank" else where.halves  # [from, to]
    graph = nx.from_numpy_array(matrix.numpy(), create_using=nx.DiGraph)
    start = torch.full((len(matrix),), 1.0 if teleport == "uniform" else 0.0, dtype=torch.float64)
    for branch in one.graph.ffns if teleport != "uniform" else ():
        values = one.stats[branch.site].values
        if teleport == "activation":
            value = (one.weights[branch.down.name].square().mean(0) * values["act_sq"] / TOKENS).sqrt()
        elif teleport == "gradient":
            value = (values["taylor_sq"] / TOKENS).sqrt()
        else:
            there = other.stats[branch.site].values["act_sq"]
            value = ((values["act_sq"] - there) / (values["act_sq"] + there)).clamp_min(0)
        start[where.nodes[branch.site]] = value
    personal = {i: float(v) for i, v in enumerate(start)}
    found = nx.pagerank(graph, alpha=0.7, personalization=personal, weight="weight", tol=1e-14, max_iter=2000)
    values = torch.tensor([found[i] for i in range(len(found))], dtype=torch.float64)
    background = other.stats if teleport == "contrast" else None
    scores = run(name, one, strength=strength, teleport=teleport, damping=0.7, background=background)
    for site, value in scores.items():
        assert torch.allclose(value, values[where.nodes[site]], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_hubs_and_authorities_are_singular_vectors(strength):
    one = example()
    where = dense(one, strength)
    hubs = run("graph_hub", one, strength=strength, iterations=400)
    authorities = run("graph_authority", one, strength=strength, iterations=400)
    for index, step in enumerate(one.graph.steps):
        nodes = [where.nodes[branch.site] for branch in step]
        sources = torch.cat([torch.arange(p.start, p.stop) for p in (where.cuts[index], *nodes)])
        targets = torch.cat([torch.arange(p.start, p.stop) for p in (*nodes, where.cuts[index + 1])])
        left, _, right = torch.linalg.svd(where.strength[targets][:, sources])
        for vectors, places, found in ((right[0], sources, hubs), (left[:, 0], targets, authorities)):
            whole = torch.zeros(len(where.strength), dtype=torch.float64)
            whole[places] = vectors.abs() / vectors.abs().sum()
            for branch in step:
                if branch.is_ffn:
                    assert torch.allclose(found[branch.site], whole[where.nodes[branch.site]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_influence_is_conserved_over_every_cut(strength):
    one = example()
    steps = [step_edges(one.graph, one.stats, i, strength) for i in range(len(one.graph.steps))]
    value, reward = seed_of(one.graph, one.stats, strength), seed_of(one.graph, one.stats, strength)
    visits = [entry_of(one.graph, one.stats, strength)]
    for step in steps:
        cut, nodes = forward(step, visits[-1])
        visits.append(cut)
        assert torch.isclose(cut.sum(), torch.tensor(1.0, dtype=torch.float64))
    whole = visits[-1] @ reward
    for index, step in reversed(list(enumerate(steps))):
        value, nodes = backward(step, value)
        assert torch.isclose(value.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert all(0 < float(v.sum()) < 1 for v in nodes.values())
        reward, _ = expected(step, reward)
        assert torch.isclose(visits[index] @ reward, whole)


@pytest.mark.parametrize("strength", ["contribution", "energy", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_rescaling_that_preserves_the_function_changes_nothing(name, strength):
    one, scaled = example(), example()
    for branch in scaled.graph.ffns:
        c = torch.linspace(0.1, 3, branch.site.d_ff, dtype=torch.float64)
        scaled.weights[branch.up.name] *= c[:, None]
        scaled.weights[branch.down.name] /= c
        scaled.stats[branch.site].values["act_sq"] *= c**2
    before, after = run(name, one, strength=strength), run(name, scaled, strength=strength)
    assert all(torch.allclose(before[site], after[site], rtol=1e-9, atol=0) for site in before)


@pytest.mark.parametrize("strength", ["contribution", "energy", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_a_channel_that_does_nothing_gets_zero(name, strength):
    one = example()
    for branch in one.graph.ffns:
        one.weights[branch.down.name][:, 0] = 0
        values = one.stats[branch.site].values
        values["act_sq"][1] = 0
        values["taylor_sq"][:2] = 0
    for value in run(name, one, strength=strength).values():
        assert value[:2].tolist() == [0, 0]
        assert bool((value[2:] > 0).all())


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_reads_each_weight_at_most_three_times(name, strength):
    one = example()
    run(name, one, strength=strength)
    assert set(one.weights) - {"head"} <= set(one.reads)
    assert max(one.reads.values()) <= 3


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, one.numel())
        return made


@pytest.mark.parametrize("name", NAMES)
def test_no_copy_of_a_weight_is_made(name, monkeypatch):
    monkeypatch.setattr(blocks, "SIZE", D_MODEL)
    one = example()
    with Largest() as largest:
        run(name, one)
    assert largest.entries <= 2 * D_MODEL < max(w.numel() for w in one.weights.values())


def test_scores_of_all_layers_are_allocated_together():
    one = example()
    scores = Scores("graph_backward", run("graph_backward", one))
    plan = build_plan(scores, Budget(0.5), allocator="global")
    kept = torch.cat([scores.values[site][index] for site, index in plan.kept.items()])
    gone = torch.cat([scores.values[site][plan.removed(site)] for site in plan.kept])
    single = torch.cat([scores.values[site][index] for site, index in plan.kept.items() if len(index) == 1])
    assert len(gone) == (len(kept) + len(gone)) // 2
    assert all(value >= gone.max() or value in single for value in kept)  # no site is left without a channel
    assert len({plan.widths[site] / site.d_ff for site in plan.kept}) > 1


def test_experts_are_weighted_by_their_share_of_the_tokens():
    one, busier = example(), example()
    first, second = (b.site for b in one.graph.steps[2][:2])
    for name in ("act_sq", "x_sq"):
        busier.stats[first].values[name].mul_(2)  # twice the tokens of the same kind
    busier.stats[first].counts["act_sq"] = busier.stats[first].counts["x_sq"] = 60
    before, after = run("graph_backward", one), run("graph_backward", busier)
    assert bool((after[first] > before[first]).all())
    assert bool((after[second] < before[second]).all())


def test_errors_say_what_to_do():
    one = example()
    with pytest.raises(UsageError, match=r"contrast.*background="):
        run("graph_pagerank", one, teleport="contrast")
    with pytest.raises(UsageError, match=r"damping must be in \[0, 1\)"):
        run("graph_pagerank", one, damping=1.0)
    with pytest.raises(UsageError, match=r"attenuation must be in \(0, 1\]"):
        run("graph_katz", one, attenuation=0.0)
    with pytest.raises(UsageError, match="iterations must be at least 1"):
        run("graph_hub", one, iterations=0)
    with pytest.raises(UnknownNameError, match="edge strength 'enery'"):
        METRICS.get("graph_backward").needed({"strength": "enery"})
    with pytest.raises(UsageError, match="Calibrate for this metric"):
        METRICS.get("graph_backward").fn(one.graph, {})
