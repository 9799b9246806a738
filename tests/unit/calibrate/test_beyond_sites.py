"""Sums by groups of documents, and sums of an FFN with that of the next layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.calibrate.groups import document_groups
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.sums import following
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import STATISTICS, by_document
from ffnscope.rules import Statistic
from reference import exact, padded, slow_signals_of_all, some_core
from tiny import D_FF
from tiny_moe import EXPERT, N_EXPERTS, tiny_moe

VECTORS = ("act_sq", "taylor_sq", "x_sum", "act_abs")
MARKS = ("tokens_by_document", "targets_by_document")
CROSS = ("act_next", "taylor_next")


def text() -> Windows:
    return replace(padded([16, 5, 16, 2, 11, 9, 7]), document=torch.tensor([4, 4, 0, 9, 9, 9, 2]))


def test_a_sum_by_document_is_the_sum_of_each_group() -> None:
    model, windows = exact("llama"), text()
    sites = find_sites(model)
    names = [*VECTORS, *map(by_document, VECTORS), *MARKS]
    options = PassOptions(batch_size=3, document_groups=3)
    found = collect(model, windows, names, sites=sites, options=options)
    for i, mask in enumerate(document_groups(windows, 3)):
        alone = collect(model, windows[mask], VECTORS, sites=sites)
        for site in sites:
            for name in VECTORS:
                assert torch.allclose(found[site].values[by_document(name)][i], alone[site].values[name], rtol=1e-10)
            counts = alone[site].counts
            assert int(found[site].values["tokens_by_document"][i]) == counts["act_sq"]
            assert int(found[site].values["targets_by_document"][i]) == counts["taylor_sq"]


def test_groups_add_up_whatever_the_batch() -> None:
    model, windows = exact("llama"), text()
    site = find_sites(model)[0]
    names = ["act_sq", "act_sq_by_document", *MARKS]
    one, four = (collect(model, windows, names, sites=[site], options=PassOptions(size))[site] for size in (1, 4))
    assert one.values["act_sq_by_document"].shape == (4, D_FF)
    assert torch.allclose(one.values["act_sq_by_document"].sum(0), one.values["act_sq"], rtol=1e-12)
    assert torch.allclose(one.values["act_sq_by_document"], four.values["act_sq_by_document"], rtol=1e-10)
    assert int(four.values["tokens_by_document"].sum()) == windows.n_tokens
    assert int(four.values["targets_by_document"].sum()) == windows.n_targets


def test_windows_without_a_backward_count_in_no_gradient() -> None:
    model, windows = exact("llama"), text()
    site = find_sites(model)[0]
    found = collect(model, windows, ["taylor_sq", *MARKS], sites=[site], options=PassOptions(2, gradient_windows=3))
    assert int(found[site].values["targets_by_document"].sum()) == found[site].counts["taylor_sq"] < windows.n_targets
    assert int(found[site].values["tokens_by_document"].sum()) == windows.n_tokens


def test_experts_count_the_tokens_that_they_are_given() -> None:
    model, windows = tiny_moe("mixtral", dtype=torch.float64), text()
    sites = find_sites(model)
    found = collect(
        model,
        windows,
        ["act_sq", "act_sq_by_document", *MARKS, "taylor_sq", *CROSS],
        sites=sites,
        core={site: torch.tensor([1]) for site in sites},
    )
    for part in found.values():
        assert torch.allclose(part.values["act_sq_by_document"].sum(0), part.values["act_sq"], rtol=1e-10)
        assert int(part.values["tokens_by_document"].sum()) == part.counts["act_sq"]
        assert int(part.values["targets_by_document"].sum()) == part.counts["taylor_sq"]
        assert not {*CROSS} & part.values.keys()  # no expert is followed by one FFN
    assert following(sites) == {}
    size = 2 * N_EXPERTS * 8 * 5
    assert statistics_bytes(sites, ["act_sq_by_document"], 0, 5) == size * EXPERT
    assert statistics_bytes(sites, ["tokens_by_document", "act_next"], 3, 5) == size


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "phi"])
def test_sums_with_the_next_layer_are_those_of_slow_autograd(arch: str) -> None:
    model, windows = exact(arch, **({} if arch in ("gpt2", "opt") else {"num_hidden_layers": 3})), text()
    sites = find_sites(model)
    core = some_core(sites)
    found = collect(model, windows, CROSS, sites=sites, core=core, options=PassOptions(3))
    signals = slow_signals_of_all(model, sites, windows)
    for a, b in pairwise(sites):
        h, q = (signals[a]["h"], signals[a]["h"] * signals[a]["g"])
        next_h, next_q = signals[b]["h"], signals[b]["h"] * signals[b]["g"]
        for name, expected in (("act_next", h[:, core[a]].T @ next_h), ("taylor_next", q[:, core[a]].T @ next_q)):
            value = found[a].values[name]
            assert value.shape == (3, b.d_ff)
            assert torch.allclose(value, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())), name
    assert not found[sites[-1]].values
    assert found[sites[0]].counts == {"act_next": windows.n_tokens, "taylor_next": windows.n_targets}


def test_only_an_analysed_next_layer_is_read() -> None:
    model = exact("llama", num_hidden_layers=3)
    first, _, last = find_sites(model)
    core = some_core([first, last])
    assert not any(p.values for p in collect(model, text(), CROSS, sites=[first, last], core=core).values())


def test_an_interrupted_pass_by_document_goes_on(tmp_path: Any) -> None:
    model, windows, path = exact("llama"), text(), tmp_path / "part.safetensors"
    sites = find_sites(model)
    names, options = ["act_sq_by_document", *CROSS, *MARKS], PassOptions(2, checkpoint=path, checkpoint_every=1)
    calls: list[int] = []

    def cut(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    given: Any = {"sites": sites, "core": some_core(sites), "options": options}
    with pytest.raises(KeyboardInterrupt):
        collect(model, windows, names, **given, on_batch=cut)
    found = collect(model, windows, names, **given, on_batch=cut)
    assert len(calls) == 4
    unbroken = collect(model, windows, names, sites=sites, core=some_core(sites), options=PassOptions(2))
    for site in sites:
        assert all(torch.equal(found[site].values[name], value) for name, value in unbroken[site].values.items())


@pytest.mark.parametrize(("shape", "reads"), [(("next",), "next_h"), (("document",), "document"), (("core",), "core")])
def test_a_shape_needs_what_it_speaks_of(shape: tuple[str, ...], reads: str) -> None:
    with pytest.raises(UsageError, match=f"has a shape with '{shape[0]}' but does not read '{reads}'"):
        Statistic("mine", lambda h: h, ("h",), "sum", shape, 1, "")


def test_siblings_are_of_plain_vector_sums() -> None:
    assert {"act_sq_by_document", "x_sum_by_document", "taylor_abs_by_document"} <= set(STATISTICS.names())
    assert not {"act_hist_by_document", "h_outer_by_document", "taylor_core_by_document"} & set(STATISTICS.names())
