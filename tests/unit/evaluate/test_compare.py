from __future__ import annotations

import math

import pytest
import torch

from ffnscope.apply.mask import masked
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import ArtifactError, NonFiniteError, UsageError
from ffnscope.evaluate.compare import compare_plans
from ffnscope.evaluate.fidelity import fidelity
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.evaluate.progress import fingerprint, plan_key
from ffnscope.io import read_state, write_state
from ffnscope.types import Budget, FFNSite, PruningPlan


class Stop(Exception):
    pass


def stop_after(batch):
    def on_batch(done, total):
        if done == batch:
            raise Stop

    return on_batch


@pytest.fixture
def plans(make_plan):
    return {"half": make_plan(0.5), "quarter": make_plan(0.25, "wanda", seed=1)}


@pytest.fixture
def count_forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def by_name(row):
    return {result.name: result for result in row.results}


def numbers(rows):
    return [(row.label, r.name, r.value, r.stderr) for row in rows for r in row.results]


@pytest.mark.parametrize("name", ["windows", "padded"])
def test_every_number_equals_the_one_measured_alone(model, plans, name, request):
    text = request.getfixturevalue(name)
    rows = compare_plans(model, plans, text, batch_size=2)
    assert [row.label for row in rows] == ["dense", "half", "quarter"]
    assert rows[0].results == (perplexity(model, text, batch_size=2),)
    with torch.no_grad():
        dense = model(text.input_ids, attention_mask=text.valid.long()).logits
    for row in rows[1:]:
        found = by_name(row)
        assert list(found) == ["perplexity", "kl_to_dense", "top1_agreement"]
        with masked(model, plans[row.label]):
            assert found["perplexity"] == perplexity(model, text, batch_size=2)
            with torch.no_grad():
                pruned = model(text.input_ids, attention_mask=text.valid.long()).logits
        kl, agree = (sums / text.n_targets for sums in fidelity(dense, pruned, text.targets))
        assert found["kl_to_dense"].value == pytest.approx(kl.sum().item(), rel=1e-4)
        assert found["top1_agreement"].value == pytest.approx(agree.sum().item(), rel=1e-9)
        assert found["kl_to_dense"].value > 0.01
        assert 0 < found["top1_agreement"].value < 1


def test_rows_say_what_they_are(model, plans, windows):
    dense, half, quarter = compare_plans(model, plans, windows)
    assert (dense.metric, dense.sparsity_asked, dense.sparsity) == (None, 0.0, 0.0)
    assert (half.metric, half.sparsity_asked, half.sparsity) == ("random", 0.5, 0.5)
    assert (quarter.metric, quarter.sparsity_asked, quarter.sparsity) == ("wanda", 0.25, 0.25)
    assert {row.dataset for row in (dense, half, quarter)} == {"random tokens"}
    found = by_name(half)
    assert [found[k].unit for k in found] == ["1", "nats/token", "fraction"]
    assert {r.n for r in half.results} == {windows.n_targets}
    assert {r.protocol for r in half.results} == {dense.results[0].protocol}
    assert all(r.stderr is not None and r.stderr > 0 for r in half.results)


def test_standard_errors_are_over_windows(model, plans, windows):
    found = by_name(compare_plans(model, {"half": plans["half"]}, windows)[1])
    alone = [by_name(compare_plans(model, {"half": plans["half"]}, windows[slice(i, i + 1)])[1]) for i in range(7)]
    for name in ("kl_to_dense", "top1_agreement"):
        each = torch.tensor([one[name].value for one in alone], dtype=torch.float64)
        assert found[name].stderr == pytest.approx(each.std().item() / math.sqrt(7), rel=1e-6)
        assert alone[0][name].stderr is None


def test_identity_plan_is_the_dense_model_exactly(model, make_plan, windows):
    dense, same = compare_plans(model, {"all": make_plan(0.0)}, windows, batch_size=3)
    found = by_name(same)
    assert (found["kl_to_dense"].value, found["kl_to_dense"].stderr) == (0.0, 0.0)
    assert (found["top1_agreement"].value, found["top1_agreement"].stderr) == (1.0, 0.0)
    assert found["perplexity"] == dense.results[0]


@pytest.mark.parametrize("name", ["windows", "padded"])
def test_batch_size_does_not_matter(model, plans, name, request):
    text = request.getfixturevalue(name)
    one = numbers(compare_plans(model, plans, text, batch_size=1))
    for size in (2, 5):
        for a, b in zip(one, numbers(compare_plans(model, plans, text, batch_size=size)), strict=True):
            assert a[:2] == b[:2]
            assert a[2:] == pytest.approx(b[2:], rel=1e-4)


def test_model_is_left_as_it_was(model, plans, windows, tmp_path):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compare_plans(model, plans, windows, batch_size=3, state=tmp_path / "state.json")
    with pytest.raises(Stop):
        compare_plans(model, plans, windows, on_batch=stop_after(2))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_resumed_equals_unbroken_exactly(model, plans, windows, tmp_path, batch, count_forwards):
    state = tmp_path / "deep" / "state.json"
    unbroken = compare_plans(model, plans, windows, batch_size=3)
    with pytest.raises(Stop):
        compare_plans(model, plans, windows, batch_size=3, state=state, on_batch=stop_after(batch))
    count_forwards.clear()
    seen = []
    again = compare_plans(model, plans, windows, batch_size=3, state=state, on_batch=lambda *n: seen.append(n))
    assert again == unbroken
    assert seen == [(i, 3) for i in range(batch + 1, 4)]
    assert len(count_forwards) == 3 * (3 - batch)


def test_stop_within_a_batch_loses_only_that_batch(model, plans, windows, tmp_path):
    state = tmp_path / "state.json"
    unbroken = compare_plans(model, plans, windows)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3 * 3 + 2:  # a pruned pass of the fourth window
            raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare_plans(model, plans, windows, state=state)
    handle.remove()
    seen = []
    assert compare_plans(model, plans, windows, state=state, on_batch=lambda *n: seen.append(n)) == unbroken
    assert seen == [(4, 7), (5, 7), (6, 7), (7, 7)]


def test_finished_comparison_runs_nothing(model, plans, windows, tmp_path, count_forwards):
    state = tmp_path / "state.json"
    first = compare_plans(model, plans, windows, state=state)
    count_forwards.clear()
    assert compare_plans(model, plans, windows, state=state, on_batch=stop_after(1)) == first
    assert count_forwards == []


def test_new_plan_computes_only_its_own_windows(model, plans, make_plan, windows, tmp_path, count_forwards):
    state = tmp_path / "state.json"
    compare_plans(model, plans, windows, batch_size=4, state=state)
    more = {**plans, "new": make_plan(0.75)}
    count_forwards.clear()
    rows = compare_plans(model, more, windows, batch_size=4, state=state)
    assert len(count_forwards) == 2 * 2  # per batch: the dense logits again, and the new plan
    assert rows == compare_plans(model, more, windows, batch_size=4)
    assert compare_plans(model, plans, windows, state=state, on_batch=stop_after(1)) == rows[:3]


def test_equal_plans_are_measured_once(model, make_plan, windows, count_forwards):
    a, b = make_plan(0.5), make_plan(0.5)
    relabelled = PruningPlan(b.kept, b.metric, b.allocator, b.budget, provenance={"another": "history"})
    assert plan_key(a) == plan_key(relabelled)
    assert plan_key(a) != plan_key(make_plan(0.5, seed=1))
    _, one, other = compare_plans(model, {"a": a, "b": relabelled}, windows, batch_size=7)
    assert len(count_forwards) == 2
    assert (one.label, other.label) == ("a", "b")
    assert one.results == other.results


def test_changed_text_starts_anew(model, plans, windows, tmp_path):
    state = tmp_path / "state.json"
    compare_plans(model, plans, windows, state=state)
    ids = windows.input_ids.clone()
    ids[3, 4] = (ids[3, 4] + 1) % 64
    other = contiguous_windows(ids, "random tokens")
    assert compare_plans(model, plans, other, state=state) == compare_plans(model, plans, other)


def test_changed_model_starts_anew(model, plans, windows, tmp_path):
    state = tmp_path / "state.json"
    compare_plans(model, plans, windows, state=state)
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert fingerprint(model) != before
    assert compare_plans(model, plans, windows, state=state) == compare_plans(model, plans, windows)


def test_fingerprint_sees_every_value():
    model = torch.nn.Linear(100, 100)
    before = fingerprint(model)
    for place in ((0, 0), (3, 7), (99, 98)):
        with torch.no_grad():
            old = model.weight[place].item()
            model.weight[place] = old + 1e-3
            assert fingerprint(model) != before
            model.weight[place] = old
    assert fingerprint(model) == before


def test_fingerprint_sees_names_shapes_and_dtypes(model):
    before = fingerprint(model)
    assert fingerprint(model) == before
    assert fingerprint(model.to(torch.bfloat16)) != before
    assert fingerprint(torch.nn.Linear(4, 9)) != fingerprint(torch.nn.Linear(9, 4))


def test_damaged_or_foreign_state_is_refused(model, plans, windows, tmp_path):
    state = tmp_path / "state.json"
    state.write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        compare_plans(model, plans, windows, state=state)
    state.write_text('{"kind": "plan"}', encoding="utf-8")
    with pytest.raises(ArtifactError, match="holds 'plan'; expected a file of kind 'comparison'"):
        compare_plans(model, plans, windows, state=state)
    state.unlink()
    compare_plans(model, plans, windows, state=state)
    value = read_state(state)
    value["rows"]["dense"]["nll"].pop()
    write_state(state, value)
    with pytest.raises(
        ArtifactError, match=r"one number per window \(7\)\. Delete it, and everything is measured anew\."
    ):
        compare_plans(model, plans, windows, state=state)


def test_no_plan_measures_the_dense_model(model, windows):
    assert [row.label for row in compare_plans(model, {}, windows)] == ["dense"]


def test_refusals(model, plans, windows):
    with pytest.raises(UsageError, match="a plan cannot be called 'dense'"):
        compare_plans(model, {"dense": plans["half"]}, windows)
    site = FFNSite(0, "model.layers.0.mlp", "gate_proj", "up_proj", "down_proj", 32, 96, "silu")
    foreign = PruningPlan({site: torch.arange(40)}, "random", "local", Budget(0.5))
    with pytest.raises(UsageError, match=r"mine: .*96 channels"):
        compare_plans(model, {"mine": foreign}, windows)
    with pytest.raises(UsageError, match="batch size must be at least 1"):
        compare_plans(model, plans, windows, batch_size=0)


def test_nan_weights_name_row_window_and_weight(model, plans, windows, tmp_path):
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"dense: window 0 of random tokens .* model\.norm\.weight holds NaN"):
        compare_plans(model, plans, windows, state=tmp_path / "state.json")
    assert not (tmp_path / "state.json").exists()


def test_a_row_beyond_floats_is_named(model, make_plan, windows):
    """The dense model is fine and the pruned one is not: its output is blown up by what was removed."""
    with torch.no_grad():
        model.lm_head.weight.zero_()

    def scale(module, args, output):
        pruned = bool((module.model.layers[0].mlp.up_proj.weight == 0).any())
        if pruned:
            output.logits = torch.arange(64.0) * 100 + output.logits
        return output

    model.register_forward_hook(scale)
    with pytest.raises(NonFiniteError, match="half: the mean NLL on random tokens is"):
        compare_plans(model, {"half": make_plan(0.5)}, windows)
