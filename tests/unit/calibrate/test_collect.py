"""The calibration pass: its steps, its checkpoint, its errors, and what it leaves of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ffnscope.calibrate.checkpoint import Checkpoint
from ffnscope.calibrate.collect import (
    PassOptions,
    calibrate,
    collect,
    plan_steps,
    required_statistics,
    weights_hash,
)
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import (
    ArtifactError,
    DeviceError,
    ModelError,
    NonFiniteError,
    NotAvailableError,
    UnknownNameError,
    UsageError,
)
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from reference import calibrate_in_two, exact, padded, some_core, text
from tiny import tiny
from tiny_all import tiny_causal_lm

ALL = METRICS.names()
MIXED = ["wanda", "activation_outlier_index", "scar_loss_proxy"]


class Cut(Exception):
    """An interruption in the middle of a pass."""


def cut_at(step):
    def on_batch(done, total):
        seen.append(done)
        if len(seen) == step:
            raise Cut

    seen: list[int] = []
    return on_batch


def equal(first, second):
    def same(a, b):
        return a.counts == b.counts and all(torch.equal(v, b.values[n]) for n, v in a.values.items())

    return first.keys() == second.keys() and all(same(part, second[site]) for site, part in first.items())


# what is collected


def test_only_what_is_asked_is_collected():
    assert required_statistics(["wanda", "activation_l2_norm", "scar_loss_proxy_factored", "random"]) == [
        "act_sq",
        "grad_sq",
    ]
    model = tiny("llama")
    found = calibrate(model, text(2), ["wanda"])
    assert {tuple(p.values) for p in found.values()} == {("act_sq",)}
    assert [s.layer for s in found] == [0, 1]


def test_parameters_choose_statistics():
    parts = {"activation_mean": 1.0, "scar_taylor": 1.0}
    assert required_statistics({"composite": {"parts": parts}, "wanda": {}}) == ["act_abs", "taylor_abs", "act_sq"]
    found = calibrate(tiny("llama"), text(2), {"composite": {"parts": parts}})
    assert {tuple(p.values) for p in found.values()} == {("act_abs", "taylor_abs")}


def test_sites_can_be_chosen():
    model = tiny("llama")
    second = find_sites(model)[1]
    whole, part = calibrate(model, text(2), ALL), calibrate(model, text(2), ALL, sites=[second])
    assert [site for site in part if site.role == "ffn"] == [second]
    assert all(torch.allclose(part[second].values[n], v, rtol=1e-5) for n, v in whole[second].values.items())


def test_metrics_without_text_run_no_model():
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: pytest.fail("the model was run"))
    found = calibrate(model, text(2), ["random", "magnitude"], sites=find_sites(tiny("llama")))
    assert {len(p.values) for p in found.values()} == {0}
    assert score(model, found, "magnitude").sites == tuple(found)


def test_forward_only_runs_no_backward(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a backward was run"))
    model = tiny("llama")
    flags = []
    model.lm_head.register_forward_hook(lambda m, a, out: flags.append((out.requires_grad, out.is_inference())))
    calibrate(model, text(3), ["wanda", "activation_outlier_index"])
    assert set(flags[1:]) == {(False, True)}  # the first is the search for sites


def test_one_forward_serves_both_kinds_of_statistics():
    model = tiny("llama")
    sites = find_sites(model)
    rows = []  # forwards of the text: those of one token are the search for the residual stream
    keep = lambda m, a, out: rows.append((len(out), out.requires_grad)) if out.shape[1] > 1 else None  # noqa: E731
    model.lm_head.register_forward_hook(keep)
    calibrate(model, text(5), ALL, sites=sites, options=PassOptions(batch_size=2))
    assert rows == [(2, True), (2, True), (1, True)]
    rows.clear()
    calibrate(model, text(5), ALL, sites=sites, options=PassOptions(batch_size=2, gradient_windows=3))
    assert rows == [(2, True), (1, True), (2, False)]


def test_steps():
    needs = ["act_sq", "taylor_sq"]

    def shape(**options):
        steps = plan_steps(text(5), needs, PassOptions(batch_size=4, **options))
        return [(len(s.batch), s.batch.length, s.forward, s.backward) for s in steps]

    assert shape() == [(4, 16, True, True), (1, 16, True, True)]
    assert shape(gradient_windows=99) == shape()
    assert shape(gradient_length=16) == shape()
    assert shape(gradient_windows=2) == [(2, 16, True, True), (3, 16, True, False)]
    assert shape(gradient_length=8) == [
        (4, 8, False, True),
        (1, 8, False, True),
        (4, 16, True, False),
        (1, 16, True, False),
    ]
    assert [s.forward for s in plan_steps(text(5), ["taylor_sq"], PassOptions(gradient_windows=2))] == [False]
    assert [s.backward for s in plan_steps(text(5), ["act_sq"], PassOptions(gradient_windows=2))] == [False, False]
    assert plan_steps(text(5), [], PassOptions()) == []


def test_progress_counts_tokens():
    seen = []
    windows = padded([16, 4, 9])
    calibrate(
        tiny("llama"),
        windows,
        MIXED,
        options=PassOptions(batch_size=1, gradient_length=8),
        on_batch=lambda *a: seen.append(a),
    )
    total = 8 + 4 + 8 + 16 + 4 + 9
    assert [d for d, _ in seen] == [8, 12, 20, 36, 40, 49]
    assert {t for _, t in seen} == {total}


# precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    low, full = tiny("llama", dtype=dtype), tiny("llama")
    core, before = some_core(find_sites(low)), tiny("llama", dtype=dtype, seed=1)
    found, expected = calibrate_in_two(low, text(4), core), calibrate_in_two(full, text(4), core)
    for site in core:
        part = expected[site]
        for name in ("act_sq", "taylor_abs", "grad_sq"):
            assert found[site].total(name).dtype == torch.float64
            assert float((found[site].total(name) / part.total(name)).median()) == pytest.approx(1, rel=0.05)
    for name in ALL:
        score(low, found, name, core=core, reference=before)


def test_a_nearly_constant_channel_keeps_its_variance_to_the_documented_error():
    model = tiny("gpt2")
    ffn = model.transformer.h[0].mlp
    with torch.no_grad():
        ffn.c_fc.weight[:, 0] *= 1e-3
        ffn.c_fc.bias[0] = 30.0
    found = calibrate(model, text(8), ["activation_variance"])
    site = next(iter(found))
    low = score(model, found, "activation_variance").values[site]
    expected = calibrate(model.double(), text(8), ["activation_variance"])
    high = score(model, expected, "activation_variance").values[site]
    assert float(high[0]) < 1e-3 * float(expected[site].mean("act_sq")[0])
    assert bool(((low - high).abs() <= 1e-6 * expected[site].mean("act_sq")).all())


# what stays of the model


@pytest.mark.parametrize("metrics", [["wanda"], MIXED])
def test_the_model_is_left_as_it_was(metrics):
    model = tiny("gpt2", resid_pdrop=0.1).train()
    model.lm_head.weight.requires_grad_(False)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    calibrate(model, text(4), metrics)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    model(input_ids=text(1).input_ids, labels=text(1).input_ids).loss.backward()  # it can still be trained


def test_two_passes_agree_bit_by_bit():
    model = tiny("gpt_neox")
    assert equal(calibrate(model, text(5), ALL), calibrate(model, text(5), ALL))


# checkpoint


@pytest.mark.parametrize("options", [{}, {"gradient_windows": 4}, {"gradient_length": 8}], ids=str)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_pass_is_an_unbroken_one(tmp_path, options, step):
    model = tiny("llama")
    file = tmp_path / "pass.safetensors"
    unbroken = calibrate(model, text(6), ALL, options=PassOptions(batch_size=1, **options))
    saved = PassOptions(batch_size=1, checkpoint=file, checkpoint_every=1, **options)
    with pytest.raises(Cut):
        calibrate(model, text(6), ALL, options=saved, on_batch=cut_at(step))
    assert file.exists()
    seen = []
    resumed = calibrate(model, text(6), ALL, options=saved, on_batch=lambda done, total: seen.append((done, total)))
    assert equal(resumed, unbroken)
    n_steps = len(plan_steps(text(6), required_statistics(ALL), saved))
    assert len(seen) == n_steps - step
    assert seen[-1][0] == seen[-1][1]
    assert not file.exists()


def test_sums_are_saved_every_so_many_windows(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(Checkpoint, "after", _counting(Checkpoint.after, writes))
    file = tmp_path / "pass.safetensors"
    options = PassOptions(batch_size=2, checkpoint=file, checkpoint_every=4)
    with pytest.raises(Cut):
        calibrate(tiny("llama"), text(10), ["wanda"], options=options, on_batch=cut_at(5))
    assert writes == [False, True, True, True, True]  # written after windows 4 and 8; there after 4


def _counting(after, writes):
    def counted(self, *args):
        after(self, *args)
        writes.append(self.path.exists())

    return counted


def test_resume_starts_from_the_last_saved_sums(tmp_path):
    file = tmp_path / "pass.safetensors"
    options = PassOptions(batch_size=2, checkpoint=file, checkpoint_every=4)
    model = tiny("llama")
    with pytest.raises(Cut):
        calibrate(model, text(10), ALL, options=options, on_batch=cut_at(3))
    seen = []
    found = calibrate(model, text(10), ALL, options=options, on_batch=lambda d, t: seen.append(d))
    assert seen == [96, 128, 160]  # the third batch runs again
    assert equal(found, calibrate(model, text(10), ALL, options=PassOptions(batch_size=2)))


def test_a_kept_checkpoint_is_the_result_of_the_pass(tmp_path):
    file = tmp_path / "pass.safetensors"
    options = PassOptions(batch_size=2, checkpoint=file, checkpoint_every=4, keep_checkpoint=True)
    model = tiny("llama")
    found = calibrate(model, text(10), ALL, options=options)
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert equal(calibrate(model, text(10), ALL, options=options, on_batch=cut_at(1)), found)  # no batch runs
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before  # and is not written again
    assert equal(calibrate(model, text(10), ALL, options=replace(options, keep_checkpoint=False)), found)
    assert not file.exists()


def test_statistics_with_and_without_the_core_in_one_sweep():
    model = tiny("llama")
    core = some_core(find_sites(model))
    found = collect(model, text(4), ["act_sq", "taylor_core", "h_outer"], core=core)
    apart = calibrate_in_two(model, text(4), core)
    for site, part in found.items():
        assert list(part.values) == ["act_sq", "h_outer", "taylor_core"]
        for name, value in part.values.items():
            torch.testing.assert_close(value, apart[site].values[name], rtol=1e-5, atol=1e-6)
            assert part.counts[name] == apart[site].counts[name]


CHANGES = {
    "weights": lambda c: c["model"].model.layers[0].mlp.up_proj.weight.data[0, 0].add_(1),
    "config": lambda c: setattr(c["model"].config, "rms_norm_eps", 0.1),
    "text": lambda c: c.update(windows=text(6, seed=1)),
    "targets": lambda c: c.update(windows=_fewer_targets(text(6))),
    "metrics": lambda c: c.update(metrics=["wanda", "scar_taylor"]),
    "sites": lambda c: c.update(sites=find_sites(c["model"])[1:]),
    "batch_size": lambda c: c.update(batch_size=2),
    "gradient_windows": lambda c: c.update(gradient_windows=4),
    "gradient_length": lambda c: c.update(gradient_length=8),
}


def _fewer_targets(windows):
    targets = windows.targets.clone()
    targets[0, 1] = False
    return Windows(windows.input_ids, windows.valid, targets, windows.document, windows.source)


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_pass_is_ignored(tmp_path, change):
    file = tmp_path / "pass.safetensors"
    case = {"model": tiny("llama"), "windows": text(6), "metrics": MIXED, "sites": None, "batch_size": 1}

    def run(checkpoint, on_batch=None):
        options = {k: v for k, v in case.items() if k not in ("model", "windows", "metrics", "sites")}
        options = PassOptions(**options, checkpoint=checkpoint, checkpoint_every=1)
        return calibrate(
            case["model"], case["windows"], case["metrics"], sites=case["sites"], options=options, on_batch=on_batch
        )

    with pytest.raises(Cut):
        run(file, cut_at(3))
    CHANGES[change](case)
    steps = []
    found = run(file, lambda done, total: steps.append(done))
    assert equal(found, run(None))
    assert len(steps) > 1
    assert steps[0] <= 16 * case["batch_size"]  # from the start


def test_a_damaged_checkpoint_is_named(tmp_path):
    file = tmp_path / "pass.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(
        ArtifactError, match=r"pass.safetensors cannot be read.*\. Delete it, and the pass starts anew\."
    ):
        calibrate(tiny("llama"), text(2), ["wanda"], options=PassOptions(checkpoint=file))


def test_weights_hash():
    model = tiny("llama")
    first = weights_hash(model)
    assert first == weights_hash(tiny("llama"))
    assert first != weights_hash(tiny("llama", seed=1))
    assert first != weights_hash(tiny("llama").to(torch.bfloat16))
    with pytest.raises(ModelError, match=r"embed_tokens.weight is on the meta device and has no value"):
        weights_hash(tiny("llama").to("meta"))


# errors


@pytest.mark.parametrize("metrics", [["wanda"], ["scar_loss_proxy"], ["activation_outlier_index"], ALL], ids=str)
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_nan_weights_name_the_site(arch, metrics):
    model = tiny(arch)
    site = find_sites(model)[1]
    with torch.no_grad():
        model.get_submodule(site.projections[-2]).weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"a channel activation of {site.name} is NaN or infinite"):
        calibrate(model, text(3), metrics)
    assert not model.get_submodule(site.projections[-1])._forward_pre_hooks


def test_overflow_in_float16_names_the_site_and_the_cure():
    model = tiny("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(4000.0)
        model.model.layers[1].mlp.gate_proj.weight.fill_(4000.0)
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp is NaN or infinite. In float16 .* bfloat16 or float32"):
        calibrate(model, text(3), ["scar_loss_proxy"])


def test_a_loss_that_is_not_finite_is_a_gradient():
    model = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    last = find_sites(model)[1]
    with pytest.raises(NonFiniteError, match=rf"an output or a gradient of {last.name} is NaN or infinite"):
        calibrate(model, text(3), ALL)
    calibrate(model, text(3), ["wanda"])  # no activation is wrong


@pytest.mark.parametrize(
    ("metrics", "key"),
    [(["wanda"], "Lower calibration.batch_size"), (MIXED, "Lower metrics.scar.max_length or calibration.batch_size")],
)
def test_out_of_memory_names_the_key(metrics, key):
    model = tiny("llama")
    sites = find_sites(model)

    def fail(module, args):
        raise torch.OutOfMemoryError("no memory")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(DeviceError, match=rf"calibration pass \(3 windows of 16 tokens\). {key}"):
        calibrate(model, text(3), metrics, sites=sites)
    assert all(p.requires_grad for p in model.parameters())


def test_code_that_lets_no_gradient_through_is_named():
    model = tiny_causal_lm("reformer")
    assert calibrate(model, text(2), ["wanda"])
    with pytest.raises(NotAvailableError, match=r"ReformerModelWithLMHead computes without gradients outside .*wanda"):
        calibrate(model, text(2), ["scar_loss_proxy"])


def test_usage_errors():
    model = tiny("llama")
    with pytest.raises(UsageError, match="no calibration window; give a text of at least one window"):
        calibrate(model, text(2)[:0], ["wanda"])
    with pytest.raises(UnknownNameError, match=r"Did you mean 'wanda'"):
        calibrate(model, text(2), ["wandas"])
    for name in ("batch_size", "gradient_windows", "gradient_length", "checkpoint_every"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1; got 0"):
            PassOptions(**{name: 0})


def test_text_without_any_target_has_no_gradient_mean():
    windows = text(2)
    none = Windows(windows.input_ids, windows.valid, torch.zeros_like(windows.valid), windows.document, "prompts only")
    model = exact("llama")
    found = calibrate(model, none, MIXED)
    score(model, found, "wanda")
    with pytest.raises(UsageError, match="'taylor_sq' has seen no token, so it has no mean"):
        score(model, found, "scar_loss_proxy")


def test_a_batch_without_targets_adds_nothing():
    windows = text(3)
    targets = windows.targets.clone()
    targets[1] = False
    some = Windows(windows.input_ids, windows.valid, targets, windows.document, "chat")
    model = exact("llama")
    found = calibrate(model, some, ["scar_taylor"], options=PassOptions(batch_size=1))
    rest = [calibrate(model, windows[i : i + 1], ["scar_taylor"]) for i in (0, 2)]
    for site, part in found.items():
        whole = rest[0][site].merge(rest[1][site])
        assert part.counts == whole.counts
        assert torch.allclose(part.total("taylor_abs"), whole.total("taylor_abs"), rtol=1e-11)
