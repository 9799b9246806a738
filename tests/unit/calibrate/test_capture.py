"""Captured arrays are those of the taps, their sums are the statistics, and a folder is whole or not there."""

from __future__ import annotations

import json

import pytest
import torch

from faults import flip_digit
from ffnscope.calibrate.capture import CaptureOptions, capture, capture_size
from ffnscope.calibrate.captured import read_capture
from ffnscope.calibrate.collect import calibrate
from ffnscope.calibrate.observe import observe_batch
from ffnscope.errors import ArtifactError, NonFiniteError, UnknownNameError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.sites import find_sites
from ffnscope.io import CHECKSUM
from reference import exact, padded, text
from tiny import tiny
from tiny_moe import TOP_K, tiny_moe

METRICS = ["activation_variance", "activation_mean", "scar_taylor", "scar_curvature", "scar_loss_proxy"]


def tapped(model, sites, windows):
    """h and g of all windows in one batch, padding included."""
    h, g = {}, {}
    with frozen(model):
        observe_batch(
            model,
            sites,
            windows,
            lambda site, values: h.__setitem__(site, values.clone()),
            lambda site, values, grad: g.__setitem__(site, grad.clone()),
        )
    return h, g


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_arrays_are_those_of_the_taps(tmp_path, arch, batch_size):
    model = exact(arch)
    sites = find_sites(model)
    windows = padded([16, 5, 9, 16, 2])
    found = capture(model, windows, tmp_path / "c", gradients=True, options=CaptureOptions(batch_size=batch_size))
    h, g = tapped(model, sites, windows)
    assert found.sites == tuple(sites)
    for site in sites:
        for values, expected in ((found.h(site), h[site]), (found.g(site), g[site])):
            rows = expected.view(5, 16, 48)[windows.valid]
            assert values.shape == (48, 48)
            assert torch.allclose(values, rows, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.token_ids, windows.input_ids[windows.valid])
    window, position = windows.valid.nonzero(as_tuple=True)
    assert torch.equal(found.window, window)
    assert torch.equal(found.position, position)
    assert len(found.parts) == -(-5 // batch_size)


def test_sums_are_the_statistics(tmp_path):
    model = exact("llama")
    windows = padded([16, 5, 9, 16])
    stats = calibrate(model, windows, METRICS)
    found = capture(model, windows, tmp_path / "c", gradients=True)
    for site, part in stats.items():
        h, g = found.h(site), found.g(site)
        sums = {
            "act_sum": h.sum(0),
            "act_abs": h.abs().sum(0),
            "act_sq": h.square().sum(0),
            "taylor_abs": (h * g).abs().sum(0),
            "taylor_sq": (h * g).square().sum(0),
            "grad_sq": g.square().sum(0),
        }
        assert sums.keys() == part.values.keys()
        for name, value in sums.items():
            assert torch.allclose(value, part.total(name), rtol=1e-10, atol=1e-12), name


def test_some_channels_of_some_sites(tmp_path):
    model = tiny("llama")
    first, second = find_sites(model)
    whole = capture(model, text(3), tmp_path / "whole", gradients=True)
    channels = {second: [5, 0, 47]}
    part = capture(model, text(3), tmp_path / "part", channels=channels, gradients=True)
    assert part.sites == (second,)
    assert part.channels[second].tolist() == [5, 0, 47]
    assert torch.equal(part.h(second), whole.h(second)[:, [5, 0, 47]])
    assert torch.allclose(part.g(second), whole.g(second)[:, [5, 0, 47]], rtol=1e-5)
    assert whole.channels[first].tolist() == list(range(48))
    with pytest.raises(UnknownNameError, match="Unknown captured site"):
        part.h(first)


def test_forward_only_runs_no_backward(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a backward was run"))
    found = capture(tiny("llama"), text(2), tmp_path / "c")
    assert found.h(found.sites[0]).shape == (32, 48)
    with pytest.raises(UsageError, match="holds no gradients; capture again with gradients=True"):
        found.g(found.sites[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_that_of_the_model(tmp_path, dtype):
    model = tiny("llama", dtype=dtype)
    found = capture(model, text(2), tmp_path / "c", gradients=True)
    site = found.sites[0]
    assert found.h(site).dtype == found.g(site).dtype == dtype
    assert found.facts["sites"][0]["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("gradients", [False, True])
def test_the_size_is_known_before(tmp_path, gradients):
    model = tiny("llama", dtype=torch.bfloat16)
    windows = padded([16, 3, 9])
    sites = find_sites(model)
    channels = {sites[0]: torch.tensor([1, 2, 3]), sites[1]: range(10)}
    size = capture_size(model, windows, channels=channels, gradients=gradients)
    assert size == 28 * (3 * 8 + 13 * 2 * (1 + gradients))
    found = capture(model, windows, tmp_path / "c", channels=channels, gradients=gradients)
    arrays = [found.token_ids, found.window, found.position, *(found.h(s) for s in sites)]
    arrays += [found.g(s) for s in sites] if gradients else []
    assert sum(a.nbytes for a in arrays) == size == found.facts["bytes"]
    on_disk = sum(p.stat().st_size for p in found.parts)
    assert size < on_disk < size + 4096 * len(found.parts)


def test_too_large_is_refused_before_anything_runs(tmp_path):
    model = tiny("llama")
    sites = find_sites(model)
    model.lm_head.register_forward_pre_hook(lambda m, a: pytest.fail("the model was run"))
    size = capture_size(model, text(2), sites=sites)
    with pytest.raises(UsageError, match=r"would take .* MiB \(32 tokens, 2 sites\); max_bytes is .* fewer windows"):
        capture(model, text(2), tmp_path / "c", sites=sites, options=CaptureOptions(max_bytes=size - 1))
    assert list(tmp_path.iterdir()) == []


def test_the_index_tells_what_is_there(tmp_path):
    model = tiny("llama")
    windows = text(3)
    capture(model, windows, tmp_path / "c", options=CaptureOptions(batch_size=2))
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "index.json",
        "part-00000.safetensors",
        "part-00001.safetensors",
    ]
    assert index["kind"] == "capture"
    assert index["schema"] == 1
    assert index["n_tokens"] == 48
    assert index["windows_hash"] == windows.hash
    assert index["gradients"] is False
    assert [row["channels"] for row in index["sites"]] == [None, None]
    assert read_capture(tmp_path / "c").sites == tuple(find_sites(model))


def test_an_existing_folder_is_refused(tmp_path):
    model = tiny("llama")
    out = tmp_path / "c"
    capture(model, text(1), out)
    with pytest.raises(ArtifactError, match=r"c exists. Choose another folder, or replace it with overwrite=True"):
        capture(model, text(2), out)
    assert read_capture(out).n_tokens == 16
    capture(model, text(2), out, options=CaptureOptions(overwrite=True))
    assert read_capture(out).n_tokens == 32
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="thesis is not a capture, so it is not overwritten"):
        capture(tiny("llama"), text(1), out, options=CaptureOptions(overwrite=True))
    assert (out / "chapter.txt").read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_capture_leaves_nothing(tmp_path, existing):
    model = tiny("llama")
    sites = find_sites(model)
    out = tmp_path / "c"
    if existing:
        capture(model, text(1), out)
    runs = []

    def cut(module, args):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(cut)
    with pytest.raises(KeyboardInterrupt):
        capture(model, text(4), out, sites=sites, options=CaptureOptions(batch_size=2, overwrite=existing))
    handle.remove()
    assert [p.name for p in tmp_path.iterdir()] == (["c"] if existing else [])
    if existing:
        assert read_capture(out).n_tokens == 16
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        capture(tiny("llama"), text(1), tmp_path / "file" / "c")


def test_incomplete_captures_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"index.json does not exist"):
        read_capture(tmp_path / "nothing")
    out = tmp_path / "c"
    found = capture(tiny("llama"), text(2), out, options=CaptureOptions(batch_size=1))
    content = bytearray(found.parts[0].read_bytes())
    content[-1] ^= 1
    found.parts[0].write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part-00000.safetensors is damaged"):
        _ = found.token_ids
    content[-1] ^= 1
    found.parts[0].write_bytes(content)
    found.parts[1].write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"part-00001.safetensors cannot be read.*capture again"):
        _ = found.token_ids
    found.parts[1].unlink()
    with pytest.raises(ArtifactError, match=r"is incomplete: part-00001.safetensors is missing"):
        read_capture(out)
    whole = (out / "index.json").read_text()
    flip_digit(out / "index.json", '"n_tokens"')
    with pytest.raises(ArtifactError, match=r"index.json is damaged: the checksum"):
        read_capture(out)
    index = {name: value for name, value in json.loads(whole).items() if name != CHECKSUM}
    (out / "index.json").write_text(json.dumps({**index, "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99; this version reads up to 1"):
        read_capture(out)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "non-empty list of different indices"),
        ([3, 3], "non-empty list of different indices"),
        ([48], r"in \[0, 48\)"),
        ([-1], r"in \[0, 48\)"),
    ],
)
def test_impossible_channels(tmp_path, bad, says):
    model = tiny("llama")
    site = find_sites(model)[0]
    with pytest.raises(UsageError, match=says):
        capture(model, text(1), tmp_path / "c", channels={site: bad})


def test_other_usage_errors(tmp_path):
    model = tiny("llama")
    first, second = find_sites(model)
    with pytest.raises(UsageError, match=r"layers.1.mlp is in only one of sites and channels"):
        capture(model, text(1), tmp_path / "c", sites=[first, second], channels={first: [0]})
    with pytest.raises(UsageError, match="no window to capture"):
        capture(model, text(1)[:0], tmp_path / "c")
    for name in ("batch_size", "max_bytes"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1; got 0"):
            CaptureOptions(**{name: 0})


def test_nan_names_the_site(tmp_path):
    model = tiny("llama")
    sites = find_sites(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"activation of model.layers.1.mlp is NaN"):
        capture(model, text(1), tmp_path / "c", sites=sites, gradients=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mixtral", "llama4_text", "dbrx"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_experts_tell_the_tokens_of_their_rows(tmp_path, name, batch_size):
    model = tiny_moe(name)
    windows = padded([16, 5, 9, 16])
    found = capture(model, windows, tmp_path / "c", gradients=True, options=CaptureOptions(batch_size=batch_size))
    stats = calibrate(model, windows, ["activation_variance", "llm_pruner"])
    whole = capture(model, windows, tmp_path / "d", gradients=True, options=CaptureOptions(batch_size=4))
    layers = {}
    for site in found.sites:
        rows, h, g = found.tokens(site), found.h(site), found.g(site)
        assert len(rows) == len(h) == len(g)
        if site.expert is None:
            assert torch.equal(rows, torch.arange(windows.n_tokens))
            continue
        assert len(rows) == stats[site].counts["act_sum"]
        assert torch.allclose(h.sum(0), stats[site].values["act_sum"].float(), atol=1e-4)
        assert torch.allclose((h * g).sum(0), stats[site].values["taylor_sum"].float(), atol=1e-4)
        order, other = rows.argsort(), whole.tokens(site).argsort()
        assert torch.equal(rows[order], whole.tokens(site)[other])  # whatever the batches are
        assert torch.allclose(h[order], whole.h(site)[other], atol=1e-5)
        layers.setdefault(site.group, []).append(rows)
    for rows in layers.values():
        counts = torch.cat(rows).bincount(minlength=windows.n_tokens)
        assert counts.tolist() == [TOP_K] * windows.n_tokens


def test_an_expert_without_tokens_has_no_rows(tmp_path):
    model = tiny_moe("mixtral")
    sites = [s for s in find_sites(model) if s.layer == 0]
    windows = text(1, 1)
    found = capture(model, windows, tmp_path / "c", sites=sites, channels={s: [3, 5] for s in sites})
    shapes = sorted(tuple(found.h(s).shape) for s in sites)
    assert shapes == [(0, 2)] * (len(sites) - TOP_K) + [(1, 2)] * TOP_K
    assert [len(found.tokens(s)) for s in sites] == [len(found.h(s)) for s in sites]
    assert found.facts["bytes"] == capture_size(model, windows, channels={s: [3, 5] for s in sites})
