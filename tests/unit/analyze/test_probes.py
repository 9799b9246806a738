from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.analyze.ablation import joint_change
from ffnscope.analyze.probes import Probe, control_probes, dose_probes, run_probes
from ffnscope.calibrate.collect import calibrate
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, FFNSite, PruningPlan
from reference import text
from tiny import tiny

CORE = torch.tensor([1, 5, 9, 20])
HALO = torch.tensor([0, 2, 3, 30, 31, 40])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama").double()


@pytest.fixture(scope="module")
def sites(model: Any) -> list[FFNSite]:
    return find_sites(model)


def of(sites: list[FFNSite], index: torch.Tensor) -> dict[FFNSite, torch.Tensor]:
    return dict.fromkeys(sites, index)


def test_a_zeroed_set_is_a_joint_ablation(model: Any, sites: list[FFNSite]) -> None:
    windows = text(5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (row,) = run_probes(model, [Probe("core", of(sites, CORE))], windows, batch_size=2)
    kept = torch.tensor([c for c in range(sites[0].d_ff) if c not in CORE.tolist()])
    change = joint_change(model, PruningPlan(of(sites, kept), "x", "x", Budget(0.1)), windows)
    counts = windows.targets.sum(1)
    assert row.loss_change == pytest.approx(float(change.sum() / counts.sum()), rel=1e-9)
    each = change / counts
    assert row.stderr == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-6)  # windows of equal length
    assert (row.n_channels, row.n_targets, row.documents) == (4 * len(sites), windows.n_targets, 5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_channels_are_set_to_the_means_that_are_given(model: Any, sites: list[FFNSite]) -> None:
    windows = text(4)
    stats = calibrate(model, windows, ["activation_variance"], sites=sites)
    means = {site: stats[site].mean("act_sum") for site in sites}
    channels = of(sites, CORE)
    zero, mean = run_probes(model, [Probe("core", channels), Probe("core", channels, "mean")], windows, means=means)
    assert zero.loss_change != mean.loss_change
    constant = {site: torch.full((site.d_ff,), 0.25, dtype=torch.float64) for site in sites}
    (other,) = run_probes(model, [Probe("core", channels, "mean")], windows, means=constant)
    assert other.loss_change != mean.loss_change
    nothing = {site: torch.zeros(site.d_ff, dtype=torch.float64) for site in sites}
    (same,) = run_probes(model, [Probe("core", channels, "mean")], windows, means=nothing)
    assert same.loss_change == pytest.approx(zero.loss_change, rel=1e-9)


def test_an_interrupted_measurement_goes_on(model: Any, sites: list[FFNSite], tmp_path: Path) -> None:
    probes = [Probe("core", of(sites, CORE)), Probe("halo", of(sites, HALO))]
    whole = run_probes(model, probes, text(6), batch_size=2)

    def stop(done: int, total: int) -> None:
        assert total == 9
        if done == 4:
            raise KeyboardInterrupt

    state = tmp_path / "probes.json"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        run_probes(model, probes, text(6), batch_size=2, state=state, on_batch=stop)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    calls: list[int] = []
    again = run_probes(model, probes, text(6), batch_size=2, state=state, on_batch=lambda done, _: calls.append(done))
    assert again == whole and len(calls) < 9
    calls.clear()
    run_probes(model, probes[:1], text(6), batch_size=2, state=state, on_batch=lambda done, _: calls.append(done))
    assert not calls


def test_controls_are_of_the_halos_size_and_outside(sites: list[FFNSite]) -> None:
    scores = {site: torch.linspace(0, 1, site.d_ff) for site in sites}
    probes = control_probes(of(sites, CORE), {"write_halo": of(sites, HALO)}, scores, draws=2)
    assert [(p.name, p.draw) for p in probes] == [
        ("core", 0), ("write_halo", 0), ("core_and_write_halo", 0), ("random", 0), ("lp_matched", 0), ("random", 1),
        ("lp_matched", 1),
    ]  # fmt: skip
    taken = {*CORE.tolist(), *HALO.tolist()}
    bins = {c: min(9, 10 * c // sites[0].d_ff) for c in range(sites[0].d_ff)}
    for probe in probes[3:]:
        for index in probe.channels.values():
            assert index.numel() == HALO.numel() and not taken & set(index.tolist())
            if probe.name == "lp_matched":
                away = [
                    abs(bins[a] - bins[b]) for a, b in zip(sorted(index.tolist()), sorted(HALO.tolist()), strict=True)
                ]
                assert max(away) <= 1  # a bin whose free channels run out borrows from the next
    assert not torch.equal(probes[3].channels[sites[0]], probes[5].channels[sites[0]])
    again = control_probes(of(sites, CORE), {"write_halo": of(sites, HALO)}, scores, draws=2)
    assert all(torch.equal(a.channels[s], b.channels[s]) for a, b in zip(probes, again, strict=True) for s in sites)


def test_matched_controls_are_as_many_where_bins_borrow_from_each_other(sites: list[FFNSite]) -> None:
    halo = torch.arange(30, 44)  # of the top bins, which have no other channels left
    scores = {site: torch.linspace(0, 1, site.d_ff) for site in sites}
    probes = control_probes(of(sites, torch.arange(44, 48)), {"write_halo": of(sites, halo)}, scores, draws=8)
    matched = [p for p in probes if p.name == "lp_matched"]
    assert all(index.numel() == 14 == index.unique().numel() for p in matched for index in p.channels.values())
    assert all(bool((index >= 15).all()) for p in matched for index in p.channels.values())  # the nearest ones


def test_doses_hold_their_share_of_the_core(sites: list[FFNSite]) -> None:
    probes = dose_probes(of(sites, CORE), sites, 0.5, shares=(0, 0.5, 1), draws=2, seed=3)
    assert [(p.facts["core_share"], p.draw) for p in probes] == [(s, d) for s in (0, 0.5, 1) for d in (0, 1)]
    for probe in probes:
        for site, index in probe.channels.items():
            assert index.numel() == site.d_ff // 2 == index.unique().numel()
            assert int(torch.isin(index, CORE).sum()) == round(4 * probe.facts["core_share"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, r"must be in \(0, 1\); got 1"),
        ({"sparsity": 0.5, "shares": (2,)}, r"must be in \[0, 1\]"),
        ({"sparsity": 0.5, "draws": 0}, "draws at least 1"),
        ({"sparsity": 0.02}, "a mask of 1 channels cannot hold 4 of 4 core channels"),
        ({"sparsity": 0.98, "shares": (0,)}, "cannot hold 0 of 4 core channels, with"),
    ],
)
def test_doses_that_cannot_be(sites: list[FFNSite], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dose_probes(of(sites, CORE), sites, **{"shares": (1,), **given})


def test_probes_that_cannot_run(model: Any, sites: list[FFNSite]) -> None:
    with pytest.raises(UsageError, match="give at least one probe"):
        run_probes(model, [], text(2))
    with pytest.raises(UsageError, match="probe 'core' has no channel"):
        run_probes(model, [Probe("core", of(sites, CORE[:0]))], text(2))
    with pytest.raises(UsageError, match="no means of them are given"):
        run_probes(model, [Probe("core", of(sites, CORE), "mean")], text(2))
