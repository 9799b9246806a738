"""Each law of metrics can fail: one bad metric per law, and good ones that pass."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import ContractError, FFNScopeError, UnknownNameError
from ffnscope.registry import STATISTICS
from ffnscope.rules import Metric, Statistic
from ffnscope.testing import check_metric


def rule(fn, *needs):
    return Metric("mine", fn, needs, "made up", 1, "test", "A made-up metric.")


def good(stats, weights, *, power: float = 2.0):
    return stats.mean("act_abs") ** power * weights.down.float().norm(dim=0)


def seeded(stats, weights, *, seed: int = 0):
    return torch.rand(stats.site.d_ff, generator=torch.Generator().manual_seed(seed))


def untyped(stats, weights, *, power=2.0):
    return stats.mean("act_abs") ** power


def without_default(stats, weights, *, power: float):
    return stats.mean("act_abs") ** power


def positional(stats, weights, power: float = 2.0):
    return stats.mean("act_abs") ** power


def undeclared(stats, weights):
    return stats.mean("act_abs") + stats.mean("act_sq")


def per_model_row(stats, weights):
    return weights.down.float().norm(dim=1)


def counts(stats, weights):
    return stats.total("act_hist").sum(0)


def no_tensor(stats, weights):
    return stats.mean("act_abs").tolist()


def divides_by_activity(stats, weights):
    return stats.mean("act_sq") / stats.mean("act_abs")


def divides_by_gradient(stats, weights):
    return stats.mean("taylor_abs") / stats.mean("grad_sq")


def divides_by_weight(stats, weights):
    return 1 / weights.up.float().norm(dim=1)


def changes_statistics(stats, weights):
    return stats.total("act_abs").mul_(2)


def changes_weights(stats, weights):
    weights.down.abs_()
    return weights.down.float().sum(0)


def sets_global_seed(stats, weights):
    torch.manual_seed(0)
    return stats.mean("act_abs")


def global_chance(stats, weights):
    with torch.random.fork_rng():
        return torch.rand(stats.site.d_ff)


def unused_seed(stats, weights, *, seed: int = 0):
    return stats.mean("act_abs")


def first_channels(stats, weights):
    return stats.mean("act_abs") * torch.arange(stats.site.d_ff).to(weights.down.device)


def in_weight_dtype(stats, weights):
    return weights.down.abs().sum(0)


def refuses_bfloat16(stats, weights):
    scale = 1.0 if weights.down.dtype != torch.bfloat16 else float("nan")
    return weights.down.float().norm(dim=0) * scale


BAD = [
    (untyped, ("act_abs",), "typed parameters"),
    (without_default, ("act_abs",), "typed parameters"),
    (positional, ("act_abs",), "typed parameters"),
    (undeclared, ("act_abs",), "declared needs"),
    (per_model_row, (), "shape"),
    (counts, ("act_hist",), "shape"),
    (no_tensor, ("act_abs",), "shape"),
    (divides_by_activity, ("act_sq", "act_abs"), "finite scores: channel 0, which is never active"),
    (divides_by_gradient, ("taylor_abs", "grad_sq"), "finite scores: channel 1, which has no gradient"),
    (divides_by_weight, (), "finite scores: channel 2, which has zero weights"),
    (changes_statistics, ("act_abs",), "purity: it changed its statistics"),
    (changes_weights, (), "purity: it changed its statistics, weights or inputs"),
    (sets_global_seed, ("act_abs",), "purity: it changed the global random state"),
    (global_chance, (), "determinism: two calls"),
    (unused_seed, ("act_abs",), "determinism: two seeds"),
    (first_channels, ("act_abs",), "order of channels"),
    (in_weight_dtype, (), "weight dtype"),
    (refuses_bfloat16, (), "finite scores: channel 0"),
]


@pytest.mark.parametrize(("fn", "needs", "law"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_a_bad_metric_is_told_which_law_it_breaks(fn, needs, law):
    with pytest.raises(ContractError, match=rf"metric 'mine' breaks the law of {law}"):
        check_metric(rule(fn, *needs))


def rule_with(fn, needs=(), inputs=()):
    return Metric("mine", fn, needs, "made up", 1, "test", "A made-up metric.", inputs)


def good_core(stats, weights, *, core):
    found = stats.mean("taylor_core").abs().sum(0)
    found[core] += 1
    return found


def good_reference(stats, weights, *, reference, power: float = 1.0):
    return (weights.up.double() - reference.up.double()).norm(dim=1) ** power


def changes_core(stats, weights, *, core):
    core.add_(1)
    return stats.mean("taylor_core").sum(0)


def changes_reference(stats, weights, *, reference):
    reference.up.mul_(2)
    return reference.up.double().sum(1)


def reads_core_as_channels_of_its_own(stats, weights, *, core):
    return stats.mean("taylor_abs") * torch.isin(torch.arange(stats.site.d_ff), torch.tensor([5, 7]))


def subtracts_in_weight_dtype(stats, weights, *, reference):
    return (weights.up - reference.up).abs().sum(1)


def core_without_inputs(stats, weights, *, core):
    return stats.mean("taylor_core").sum(0)


def nan_on_core(stats, weights, *, core):
    found = stats.mean("taylor_abs").clone()
    found[core[:1]] = float("nan")
    return found


@pytest.mark.parametrize(
    ("fn", "needs", "inputs", "law"),
    [
        (changes_core, ("taylor_core",), ("core",), "purity: it changed its statistics, weights or inputs"),
        (changes_reference, (), ("reference",), "purity: it changed its statistics, weights or inputs"),
        (reads_core_as_channels_of_its_own, ("taylor_abs",), ("core",), "order of channels"),
        (subtracts_in_weight_dtype, (), ("reference",), "weight dtype"),
        (core_without_inputs, ("taylor_core",), (), "typed parameters: 'core' must be keyword-only, with a type and"),
        (nan_on_core, ("taylor_abs",), ("core",), "finite scores: channel 5, which is an ordinary one"),
        (good_core, (), ("core",), "declared needs"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_bad_metric_of_core_or_reference(fn, needs, inputs, law):
    with pytest.raises(ContractError, match=rf"metric 'mine' breaks the law of {law}"):
        check_metric(rule_with(fn, needs, inputs))


def test_good_metrics_of_core_and_reference_pass():
    check_metric(rule_with(good_core, ("taylor_core",), ("core",)))
    check_metric(rule_with(good_reference, (), ("reference",)))


def test_statistics_of_every_signal(monkeypatch):
    def product(*signals):
        return signals[0].abs().sum(0) + signals[1].abs().sum()

    STATISTICS.names()
    reads = [("h", "x"), ("h", "y"), ("h", "dy"), ("g", "x"), ("g", "dy")]
    names = [f"of_{'_'.join(r)}" for r in reads]
    for name, read in zip(names, reads, strict=True):
        monkeypatch.setitem(STATISTICS._items, name, Statistic(name, product, read, "sum", ("d_ff",), 1, "Made up."))
    check_metric(rule_with(lambda stats, weights: sum(stats.mean(n) for n in names), tuple(names)))


def test_needs_that_depend_on_parameters():
    def needs(params):
        return ("act_abs",) if params.get("power", 1.0) else ()

    check_metric(rule_with(good, needs))


def test_statistics_in_parts(monkeypatch):
    def spread(h):
        return h.std(0) * len(h)  # no sum over tokens: two halves do not add up to the whole

    item = Statistic("spread", spread, ("h",), "sum", ("d_ff",), 1, "Not a sum.")
    monkeypatch.setitem(STATISTICS._items, "spread", item)
    with pytest.raises(ContractError, match="breaks the law of batch split"):
        check_metric(rule(lambda stats, weights: stats.mean("spread"), "spread"))


@pytest.mark.parametrize(("fn", "needs"), [(good, ("act_abs",)), (seeded, ())])
def test_good_metrics_pass(fn, needs):
    check_metric(rule(fn, *needs))


def test_the_error_is_an_assertion_and_an_ffnscope_error():
    assert issubclass(ContractError, AssertionError)
    assert issubclass(ContractError, FFNScopeError)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'wanda'"):
        check_metric("wandas")
    with pytest.raises(UnknownNameError, match="statistic 'nothing'"):
        check_metric(rule(good, "nothing"))


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    check_metric("random")
    assert torch.equal(state, torch.get_rng_state())
