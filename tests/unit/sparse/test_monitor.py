"""A model that decodes by a card: the same text, what the monitor sees, and what it does about drift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.sparse import runtime as runtime_module
from ffnscope.sparse import timing
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.kernels.break_even import DENSITIES, Forms, RowTimes
from ffnscope.sparse.monitor import HORIZON, Monitor, MonitorOptions, RunningMean, band_of, signals
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.tracing import trace
from ffnscope.types import FFNSite
from reference import text
from tiny import tiny, tokens

PATH = r"model\.layers\.\*\.mlp"
Made = tuple[Any, SparsityCard, dict[FFNSite, Selector]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = tiny("llama")
    traces = trace(model, text(40), tmp_path_factory.mktemp("monitor") / "traces")
    return model, *fit_card(model, traces, SelectionRule("oracle", "threshold"), Target("density", 0.4))


@torch.no_grad()
def decode(model: Any, steps: int = 6, rows: int = 1) -> Tensor:
    ids = tokens(rows, 5 + steps)
    out = model(input_ids=ids[:, :5], use_cache=True)
    found = []
    for step in range(steps):
        out = model(input_ids=ids[:, 5 + step : 6 + step], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def shifted(card: SparsityCard, by: float) -> SparsityCard:
    """The card with bands somewhere else."""
    bands = {"density": (0.4 + by, 0.41 + by)}
    return replace(card, sites=tuple(replace(one, bands=bands) for one in card.sites))


class TestByHand:
    def test_running_mean(self) -> None:
        mean, keep = RunningMean(), 1 - 1 / HORIZON
        for value in (1.0, 2.0, 4.0):
            mean.add(value)
        expected = (keep**2 * 1 + keep * 2 + 4) / (keep**2 + keep + 1)
        assert (mean.value, mean.tokens) == (pytest.approx(expected), 3)
        several = RunningMean()
        several.add(1.0, 5)
        assert (several.value, several.tokens) == (pytest.approx(1), 5)

    def test_band(self) -> None:
        assert band_of(torch.full((300,), 0.25)) == pytest.approx((0.25, 0.25))
        low, high = band_of(torch.rand(5000, generator=torch.Generator().manual_seed(0)))
        assert 0.4 < low < 0.48 < 0.52 < high < 0.6

    def test_signals(self) -> None:
        scores = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
        found = signals(scores, torch.tensor([[False, True], [True, False]]))
        assert found["density"].tolist() == [0.5, 0.5]
        assert found["kept_mass"].tolist() == [0.75, 1.0]


class TestWrapped:
    def test_by_a_card_as_by_its_selectors(self, made: Made) -> None:
        model, card, selectors = made
        wrap_(model, selectors, break_even=1.0)
        expected = decode(model)
        unwrap_(model)
        for every in (None, 1):
            runtime = wrap_(model, card, break_even=1.0, monitor=MonitorOptions(audit_every=every))
            assert torch.equal(decode(model), expected)
            unwrap_(model)
            assert runtime.monitor is not None
            assert [drift.tokens for drift in runtime.monitor.report()] == [6, 6]
            assert not any(drift.alarms for drift in runtime.monitor.report())

    def test_audits_are_exact_and_take_turns(self, made: Made) -> None:
        _, card, selectors = made
        watch = Monitor(card, selectors, MonitorOptions(audit_every=2))
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
        for row in x.split(1):
            for selector in watch.selectors.values():
                selector(row)
        report = watch.report()
        assert [drift.audits for drift in report] == [5, 5]  # of 20 tokens every second one, in one of two FFNs
        site = report[0].site
        ffn = selectors[site].predictor.ffn
        rows = x[3::4]
        missed = (ffn.contributions(rows) * ~selectors[site](rows)).sum(-1) / ffn.contributions(rows).sum(-1)
        assert report[0].audited["missed_mass"] == pytest.approx(float(missed.mean()), rel=1e-5)

    def test_drift_makes_an_ffn_dense_until_it_is_back(self, made: Made) -> None:
        _, card, selectors = made
        site = card.sites[0].site
        x = torch.randn(1, 32)
        for fallback in (True, False):
            watch = Monitor(shifted(card, 0.5), selectors, MonitorOptions(fallback=fallback))
            selector = watch.selectors[site]
            masks = [selector(x) for _ in range(HORIZON + 3)]
            assert not masks[HORIZON - 2].all()
            assert bool(masks[-1].all()) == fallback
            assert watch.drifting == (site,)
            assert watch.report()[0].alarms == 1
            selector.card = replace(selector.card, bands={"density": (0.0, 1.0)})
            assert not selector(x).all()
            assert watch.drifting == ()

    def test_a_token_with_little_kept_mass_runs_dense(self, made: Made) -> None:
        _, card, selectors = made
        site = card.sites[0].site
        x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
        scores, mask = selectors[site].predictor(x), selectors[site](x)
        kept = signals(scores, mask)["kept_mass"]
        limit = float(kept.median())
        watch = Monitor(card, selectors, MonitorOptions(min_kept_mass=limit, audit_every=None, margin=1e9))
        found = watch.selectors[site](x)
        assert torch.equal(found.all(-1), kept < limit)
        assert torch.equal(found[kept >= limit], mask[kept >= limit])
        with pytest.raises(UsageError, match=r"min_kept_mass must be in \[0, 1\]"):
            MonitorOptions(min_kept_mass=2)

    def test_a_batch_counts_its_tokens(self, made: Made) -> None:
        model, card, _ = made
        runtime = wrap_(model, card, break_even=1.0)
        decode(model, rows=3)
        unwrap_(model)
        assert runtime.monitor is not None
        assert [drift.tokens for drift in runtime.monitor.report()] == [18, 18]

    def test_the_warning(self, made: Made) -> None:
        model, card, _ = made
        away = replace(card, facts=card.facts, sites=shifted(card, 0.5).sites)
        runtime = wrap_(model, away, break_even=1.0)
        try:
            with pytest.warns(
                UserWarning, match=r"unlike the calibration's in .* FFN\(s\), which run dense: .*density"
            ):
                for _ in range(3):
                    decode(model, steps=40)
            dense = decode(model, steps=4)
        finally:
            unwrap_(model)
        torch.testing.assert_close(dense, decode(model, steps=4), atol=1e-5, rtol=1e-4)
        assert runtime.monitor is not None
        assert len(runtime.monitor.drifting) == 2

    def test_refused(self, made: Made) -> None:
        model, card, _ = made
        with pytest.raises(ArtifactError, match="was made for weights with the hash"):
            wrap_(tiny("gpt2"), card)
        dense = replace(card, sites=tuple(replace(one, parameter=None) for one in card.sites))
        with pytest.raises(UsageError, match="or a card with such an FFN"):
            wrap_(model, dense)
        with pytest.raises(UsageError, match="audit_every must be at least 1"):
            MonitorOptions(audit_every=0)


def takes(monkeypatch: pytest.MonkeyPatch, rows: float, *decoding: float) -> None:
    """Let rows take so much of the dense time at density 1, and selecting and reading them so much in each FFN."""
    times = RowTimes(tuple(rows * density for density in DENSITIES))
    monkeypatch.setattr(runtime_module, "reading_times", lambda *args: times)
    shares = iter(decoding)
    monkeypatch.setattr(runtime_module, "decoding_time", lambda *args: next(shares))


class TestNeverSlower:
    def test_what_is_slower_is_left_dense(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        """Selecting and reading rows takes 1.1 of the dense time in one FFN, 0.9 in the other."""
        model, card, selectors = made
        first, second = selectors
        wrap_(model, {second: selectors[second]}, break_even=1.0)
        expected = decode(model)
        unwrap_(model)
        takes(monkeypatch, 1.0, 1.1, 0.9)
        with pytest.warns(
            UserWarning, match=rf"left dense in LlamaForCausalLM, which is faster: {PATH}: selecting .* takes longer"
        ):
            runtime = wrap_(model, card)
        assert torch.equal(decode(model), expected)
        assert list(runtime.levels) == list(runtime.measured()) == [second]
        assert runtime.monitor is not None and [d.tokens for d in runtime.monitor.report()] == [6]
        alone = wrap_(unwrap_(model), {second: selectors[second]}, break_even=1.0)
        assert runtime.copied_bytes == alone.copied_bytes > 0
        assert first.name not in {site.name for site in runtime.levels}
        unwrap_(model)

    def test_where_nothing_pays_the_model_is_dense(self, made: Made) -> None:
        """The oracle computes gate and up before it selects, on a machine of any speed."""
        model, card, _ = made
        dense = decode(model)
        with pytest.warns(UserWarning, match="left dense"):
            runtime = wrap_(model, card)
        assert torch.equal(decode(model), dense) and not runtime.levels and not runtime.copied_bytes
        assert torch.equal(decode(unwrap_(model)), dense)

    def test_not_where_the_caller_decides(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        model, card, selectors = made
        wrap_(model, selectors, break_even=0.0)
        expected = decode(model)
        unwrap_(model)
        for limit, never in ((None, False), (1.0, None), (0.0, None)):
            runtime = wrap_(model, card, break_even=limit, never_slower=never)
            torch.testing.assert_close(decode(model), expected, atol=1e-5, rtol=1e-5)
            assert len(runtime.levels) == 2
            unwrap_(model)
        takes(monkeypatch, 0.0, 0.0, 0.0)
        with pytest.warns(UserWarning, match="left dense"):  # dense under the mask, with its selection beside it
            assert not wrap_(model, card, break_even=0.3, never_slower=True).levels
        unwrap_(model)

    def test_what_is_timed_is_what_decodes(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        model, card, selectors = made
        seen: list[int] = []

        def share(what: Any, dense: Any, runs: Any, device: torch.device) -> float:
            seen.extend((len(dense), len(runs)))
            for one in (*dense, *runs):
                one()
            return 0.1

        def rows(shape: Any, d_ff: int, forms: Forms, device: torch.device) -> RowTimes:
            for one, under, some in zip(forms.dense, forms.masked, forms.sparse, strict=True):
                one()
                under()
                some(torch.arange(5, dtype=torch.int32))
            return RowTimes(tuple(DENSITIES))

        monkeypatch.setattr(timing, "share_of_dense", share)
        monkeypatch.setattr(timing, "row_times", rows)
        wrap_(model, selectors, break_even=1.0)
        expected = decode(model)
        unwrap_(model)
        runtime = wrap_(model, card)
        assert torch.equal(decode(model), expected) and seen == [2, 2, 2, 2]
        assert runtime.monitor is not None and [d.tokens for d in runtime.monitor.report()] == [6, 6]
        assert {row.tokens for row in runtime.measured().values()} == {6}
        unwrap_(model)

    def test_masked_ffns_are_left_dense_with_their_reason(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        model, card, _ = made
        monkeypatch.setattr(runtime_module, "differs", lambda *args: True)
        dense = decode(model)
        with pytest.warns(UserWarning, match="left dense in .*: its code names its width"):
            wrap_(model, card)
        assert torch.equal(decode(model), dense)
        unwrap_(model)
        with pytest.warns(UserWarning, match="left dense in .*: its code names its width"):
            assert not wrap_(model, card, break_even=1.0, never_slower=True).levels
        unwrap_(model)
        with pytest.warns(UserWarning, match="dense under the mask in .*: its code names its width"):
            runtime = wrap_(model, card, break_even=1.0)
        assert not torch.equal(decode(model), dense)
        rows = runtime.measured().values()
        assert {(row.read, row.sparse_steps) for row in rows} == {(1.0, 0.0)} and all(row.union < 1 for row in rows)
        unwrap_(model)

    def test_selectors_have_no_density(self, made: Made) -> None:
        with pytest.raises(UsageError, match="never_slower needs the densities of a card"):
            wrap_(made[0], made[2], never_slower=True)
