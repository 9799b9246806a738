"""Cards of tiny models: targets are met, certificates and allocations are what they say, files are refused or read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from card_sets import RULE, Set
from ffnscope.errors import ArtifactError, UnknownNameError, UsageError
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.report.card_table import card_grids, card_sentences
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.card_options import CAP, CardOptions, CardTexts, Certify, PerplexityTarget, ladder_of
from ffnscope.sparse.choose import most_batches
from ffnscope.sparse.costs import UNIT, predictor_bytes, sparse_bytes
from ffnscope.sparse.evaluation import form_losses
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.forms import MaskedForm, dense_bytes
from ffnscope.sparse.losses import loss_change
from ffnscope.sparse.masking import masked_by
from ffnscope.sparse.measures import measure
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import trace
from reference import padded, text
from tiny import tiny
from tiny_moe import tiny_moe

POLICY_PARAMS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("top_k", "threshold", "channel_threshold", "nucleus", "statistical_top_k")},
    "capped_threshold": {"k_min": 2, "k_max": 40},
    "bank_top_k": {"size": 16},
    "hybrid": {"core": 0.05, "rest": "threshold"},
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("card"))


class TestTargets:
    @pytest.mark.parametrize(
        ("measure_name", "value"), [("recall", 0.9), ("missed_mass", 0.1), ("density", 0.4), ("relative_error", 0.2)]
    )
    @pytest.mark.parametrize("policy", POLICY_PARAMS)
    def test_every_ffn_meets_it_on_the_calibration_documents(
        self, one: Set, measure_name: str, value: float, policy: str
    ) -> None:
        rule = SelectionRule("low_bit", policy, {"group": 16}, POLICY_PARAMS[policy])
        card = one.fit(rule, Target(measure_name, value))  # type: ignore[arg-type]
        for row in card.sites:
            found = row.figures["calibrate"][measure_name].mean
            assert found >= value - 1e-9 if measure_name == "recall" else found <= value + 1e-9
            assert abs(found - value) < 0.15
            assert row.density == pytest.approx(row.figures["calibrate"]["density"].mean)
        assert card.target == (measure_name, value)
        assert set(card.figures) == {"calibrate", "test"}

    def test_figures_are_those_of_the_selectors_on_other_documents(self, one: Set) -> None:
        card, selectors = fit_card(one.model, one.traces, RULE, Target("recall", 0.9))
        site, row = card.sites[1].site, card.sites[1]
        selector = selectors[site]
        x = one.traces.x(site, "test")
        expected = measure(selector.predictor.ffn, selector, x, WantedChannels().label).summary()
        for name, value in expected.items():
            figure = row.figures["test"][name]
            assert (figure.mean, figure.p5, figure.p95) == pytest.approx((value.mean, value.p5, value.p95))
            assert figure.stderr is not None
        both = [r.figures["test"]["recall"].mean for r in card.sites]
        assert card.figures["test"]["recall"].mean == pytest.approx(sum(both) / len(both))
        assert card.loss == {}

    def test_bytes(self, one: Set) -> None:
        card, selectors = fit_card(one.model, one.traces, RULE, Target("density", 0.5))
        row = card.sites[0]
        matrix = row.site.d_model * row.site.d_ff * 2  # of 16 bits, though the model has float32
        own = predictor_bytes(selectors[row.site].predictor)
        assert row.bytes_dense == 3 * matrix
        assert row.bytes_read == pytest.approx(own + 0.5 * 3 * matrix)
        assert row.break_even == pytest.approx(1 - own / (3 * matrix))
        assert card.bytes_read == pytest.approx(sum(r.bytes_read for r in card.sites))
        assert card.bytes_dense == 2 * 3 * matrix

    def test_a_card_and_a_curve_count_bytes_alike(self, one: Set) -> None:
        card, selectors = fit_card(one.model, one.traces, RULE, Target("density", 0.5))
        row = card.sites[0]
        assert row.bytes_read == sparse_bytes(selectors[row.site].predictor, row.density)
        assert dense_bytes(one.model) == card.bytes_dense
        words = " ".join(card_sentences(card) + card_grids(card)[-1].notes)
        assert words.count(UNIT) == 2

    def test_what_would_read_more_than_dense_stays_dense(self, one: Set) -> None:
        card, selectors = fit_card(one.model, one.traces, RULE, Target("density", 0.95))
        assert selectors == {}
        for row in card.sites:
            assert (row.dense, row.density, row.bytes_read, row.bands) == (True, 1, row.bytes_dense, {})
            assert row.figures["test"]["missed_mass"].mean == 0
        assert card.tensors == {}

    def test_a_second_text(self, one: Set, tmp_path: Path) -> None:
        second = trace(one.model, text(5, seed=9), tmp_path / "second")
        texts = CardTexts(second=second, second_windows=text(5, seed=9))
        card, selectors = fit_card(one.model, one.traces, RULE, Target("recall", 0.9), texts=texts)
        assert "second" in card.facts
        site = card.sites[0].site
        expected = measure(selectors[site].predictor.ffn, selectors[site], second.x(site), WantedChannels().label)
        assert (list(card.loss), card.loss["second"].n_documents) == (["second"], 5)
        assert card.sites[0].figures["second"]["recall"].mean == pytest.approx(expected.summary()["recall"].mean)

    @pytest.mark.filterwarnings("ignore:dense under the mask in")
    def test_experts_that_share_parameters(self, tmp_path: Path) -> None:
        """Fitted, measured in the loss, and decoded by."""
        model, windows = tiny_moe("mixtral"), text(20, 24)
        traces = trace(model, windows, tmp_path / "moe")
        rule = SelectionRule("static", "top_k")
        card, selectors = fit_card(model, traces, rule, Target("density", 0.5), texts=CardTexts(windows))
        assert all(row.site.stacked for row in card.sites)
        held = traces.windows_of(windows, "test")
        runtime = wrap_(model, card, prefill=True, never_slower=False)
        assert set(runtime.levels.values()) == {"masked"} and len(runtime.levels) == len(selectors) > 0
        assert perplexity(model, held).value == pytest.approx(card.loss["test"].sparse, rel=1e-4)
        assert perplexity(unwrap_(model), held).value == pytest.approx(card.loss["test"].dense, rel=1e-6)
        assert card.loss["test"].sparse != pytest.approx(card.loss["test"].dense, rel=1e-4)

    def test_experts_without_tokens_are_left_out(self, tmp_path: Path) -> None:
        model = tiny_moe("mixtral")
        traces = trace(model, padded([16, 9, 12, 16, 5, 3, 8]), tmp_path / "moe")
        card, _ = fit_card(model, traces, SelectionRule("oracle", "top_k"), Target("density", 0.5))
        names = {row.site.name for row in card.sites}
        assert names | set(card.facts["left_out"]) == {site.name for site in traces.sites}
        for site in traces.sites:
            parts = [len(traces.tokens(site, part)) for part in ("fit", "calibrate")]  # type: ignore[arg-type]
            assert (site.name in names) == all(parts)


class TestPerplexity:
    def test_the_loss_under_selections(self, one: Set) -> None:
        card, selectors = fit_card(one.model, one.traces, RULE, Target("density", 0.3), texts=CardTexts(one.windows))
        windows = one.windows[:7]
        dense, sparse = (form_losses(one.model, form, windows).nll for form in (None, MaskedForm("card", selectors)))
        change = loss_change(dense, sparse, windows)
        assert change.dense == pytest.approx(perplexity(one.model, windows).value)
        with masked_by(one.model, selectors):
            assert change.sparse == pytest.approx(perplexity(one.model, windows).value)
        assert change.sparse != pytest.approx(change.dense, rel=1e-4)
        assert change.difference == pytest.approx(math.log(change.sparse / change.dense))
        assert change.n_documents == 7
        assert card.loss["test"].n_documents == 12
        assert perplexity(one.model, windows).value == pytest.approx(change.dense)  # put back

    def test_the_lowest_density_within_the_increase(self, one: Set) -> None:
        target = PerplexityTarget(0.2)
        densities = (0.8, 0.6, 0.4, 0.2, 0.1)
        card = one.fit(target=target, densities=densities)
        assert card.loss["calibrate"].difference <= target.nats
        chosen = next(d for d in densities if card.sites[0].density == pytest.approx(d, abs=0.02))
        below = one.fit(target=Target("density", next(d for d in densities if d < chosen)))
        assert below.loss["calibrate"].difference > target.nats
        assert len({round(row.density, 3) for row in card.sites}) == 1

    def test_it_needs_the_traced_text(self, one: Set) -> None:
        with pytest.raises(UsageError, match="need the text itself"):
            fit_card(one.model, one.traces, RULE, PerplexityTarget(0.01))
        with pytest.raises(UsageError, match="not those that were traced"):
            fit_card(one.model, one.traces, RULE, PerplexityTarget(0.01), texts=CardTexts(text(4)))
        with pytest.raises(UsageError, match=r"increase of the perplexity must be in \(0, 10\]"):
            PerplexityTarget(0)


class TestCertificates:
    @pytest.mark.parametrize("method", ["risk_control", "split_conformal", "learn_then_test"])
    def test_recall(self, one: Set, method: Any) -> None:
        certify = Certify(method, 0.2)
        card = one.fit(target=Target("recall", 0.7), certify=certify)
        assert card.certificate is not None
        assert (card.certificate.method, card.certificate.n_documents) == (method, 12)
        assert card.certificate.limit == pytest.approx(0.3)
        figure = card.figures["calibrate"]["recall"]
        assert card.certificate.loss == pytest.approx(1 - figure.mean)  # documents of equal length
        if method == "risk_control":
            assert (12 * card.certificate.loss + 1) / 13 <= 0.3
        assert card.facts["certified_loss"] == "1 - recall"

    def test_it_is_more_careful_than_meeting_the_target(self, one: Set) -> None:
        plain = one.fit(target=Target("missed_mass", 0.3))
        certified = one.fit(target=Target("missed_mass", 0.3), certify=Certify())
        assert certified.figures["calibrate"]["missed_mass"].mean < plain.figures["calibrate"]["missed_mass"].mean
        assert certified.bytes_read > plain.bytes_read

    def test_relative_error_has_one_density(self, one: Set) -> None:
        card = one.fit(target=Target("relative_error", 0.5), certify=Certify())
        assert len({round(row.density, 2) for row in card.sites}) == 1
        assert card.certificate is not None

    def test_perplexity(self, one: Set) -> None:
        card = one.fit(target=PerplexityTarget(1.0), certify=Certify("learn_then_test", 0.5), densities=(0.8, 0.5, 0.2))
        assert card.certificate is not None
        assert card.certificate.limit == pytest.approx(1 / CAP)
        assert card.certificate.loss <= 1 / CAP

    def test_refused(self, one: Set) -> None:
        with pytest.raises(UsageError, match="needs at least 19 calibration documents; there are 12"):
            one.fit(target=Target("recall", 0.95), certify=Certify())
        with pytest.raises(UsageError, match="no certificate"):
            one.fit(target=Target("density", 0.5), certify=Certify())
        with pytest.raises(UsageError, match="cannot be promised"):
            one.fit(target=Target("recall", 1.0), certify=Certify())
        with pytest.raises(UsageError, match="choose one of the two"):
            one.fit(target=PerplexityTarget(0.1), certify=Certify(), allocation="fisher")
        with pytest.raises(UsageError, match="needs at least 50 calibration documents; there are 12"):
            one.fit(target=PerplexityTarget(0.1), certify=Certify("learn_then_test", test="bootstrap"))
        with pytest.raises(UnknownNameError, match="test of a certificate"):
            Certify("learn_then_test", test="wald")  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match="method of a certificate"):
            Certify("crc")  # type: ignore[arg-type]


class TestAllocation:
    @pytest.mark.parametrize("kind", ["relative_error", "fisher", "measured"])
    def test_within_the_bytes_of_the_uniform_one_and_only_when_better(self, one: Set, kind: Any) -> None:
        densities = (0.8, 0.5, 0.3, 0.1)
        uniform = one.fit(target=Target("density", 0.5), densities=densities)
        card = one.fit(target=Target("density", 0.5), allocation=kind, densities=densities, floor=0.2)
        facts = card.allocation
        assert facts["asked"] == kind
        assert facts["budget_bytes"] == pytest.approx(uniform.bytes_read)
        assert card.bytes_read <= uniform.bytes_read + 1e-6
        better = facts["loss_difference"] + 1.96 * facts["stderr"] < 0
        assert facts["used"] == (kind if better else "uniform")
        assert facts["uniform_perplexity"] == pytest.approx(uniform.loss["calibrate"].sparse)
        if better:
            assert card.loss["calibrate"].sparse == pytest.approx(facts["allocated_perplexity"])
        else:
            assert [row.density for row in card.sites] == [row.density for row in uniform.sites]

    @pytest.mark.parametrize("kind", ["fisher", "measured"])
    def test_used_where_one_ffn_does_nothing(self, kind: Any, tmp_path: Path) -> None:
        lazy = Set(tmp_path, idle_layer=0)
        uniform = lazy.fit(target=Target("density", 0.3))
        card = lazy.fit(target=Target("density", 0.3), allocation=kind, floor=0.0)
        assert card.allocation["used"] == kind
        assert card.sites[0].density < 0.3 < card.sites[1].density
        assert card.loss["test"].sparse < uniform.loss["test"].sparse
        assert card.loss["calibrate"].sparse == pytest.approx(card.allocation["allocated_perplexity"])

    def test_refused(self, one: Set) -> None:
        with pytest.raises(UsageError, match="nothing to allocate"):
            one.fit(target=Target("recall", 0.9), allocation="fisher")
        with pytest.raises(UsageError, match="need the text itself"):
            options = CardOptions(allocation="fisher")
            fit_card(one.model, one.traces, RULE, Target("density", 0.5), options=options)


class TestRules:
    @pytest.mark.parametrize(
        "rule",
        [
            SelectionRule("oracle", "threshold"),
            SelectionRule("random", "top_k", {"seed": 3}),
            SelectionRule("static", "top_k"),
            SelectionRule("sign_bit", "threshold"),
            SelectionRule("low_bit", "statistical_top_k", {"bits": 3, "group": 16}),
            SelectionRule("whitened_svd", "nucleus", {"rank": 4}),
            SelectionRule("whitened_svd", "nucleus", {"rank": 4, "up": False}),
            SelectionRule("exact_gate", "channel_threshold", {"norm": False}),
            SelectionRule("exact_up", "capped_threshold", {}, {"k_min": 2, "k_max": 47}),
            SelectionRule("low_rank", "bank_top_k", {"rank": 4, "epochs": 1}, {"size": 12}),
            SelectionRule("deja_vu", "threshold", {"rank": 4, "epochs": 1}),
            SelectionRule("random", "statistical_top_k"),
            SelectionRule("low_bit", "hybrid", {"group": 16}, {"core": 0.1, "rest": "threshold"}),
        ],
        ids=lambda rule: f"{rule.predictor}-{rule.policy}",
    )
    def test_a_file_gives_the_same_selections(self, one: Set, rule: SelectionRule, tmp_path: Path) -> None:
        card, selectors = fit_card(one.model, one.traces, rule, Target("density", 0.5))
        write_card(tmp_path / "card.json", card)
        again = read_card(tmp_path / "card.json")
        assert (again.rule, again.target, again.sites) == (card.rule, card.target, card.sites)
        assert (again.figures, again.facts) == (card.figures, card.facts)
        found = again.selectors(one.model)
        assert list(found) == list(selectors)
        for site, selector in selectors.items():
            x = one.traces.x(site)[:40]
            assert torch.equal(found[site](x), selector(x))
            assert found[site].predictor.bytes_read == selector.predictor.bytes_read

    def test_refused(self) -> None:
        with pytest.raises(UnknownNameError, match=r"Unknown predictor 'low_bits'\. Did you mean 'low_bit'"):
            SelectionRule("low_bits")
        with pytest.raises(UnknownNameError, match="parameter of policy 'capped_threshold'"):
            SelectionRule("oracle", "capped_threshold", {}, {"kmin": 2})
        with pytest.raises(UsageError, match=r"policy 'capped_threshold' needs k_max; give"):
            SelectionRule("oracle", "capped_threshold", {}, {"k_min": 2})
        with pytest.raises(UnknownNameError, match="parameter of policy 'channel_threshold' 'gain'"):
            SelectionRule("oracle", "channel_threshold", {}, {"gain": 1})
        with pytest.raises(UsageError, match="griffin takes its scores from a prompt; give prompt"):
            SelectionRule("griffin")
        with pytest.raises(UsageError, match="lookahead must be 0 or 1 layers; got 2"):
            SelectionRule("low_rank", "top_k", {"lookahead": 2})
        with pytest.raises(UsageError, match="rest of hybrid must be a policy that fits no tensors"):
            SelectionRule("oracle", "hybrid", {}, {"rest": "hybrid"})


class TestFiles:
    @pytest.fixture
    def path(self, one: Set, tmp_path: Path) -> Path:
        card = one.fit(target=Target("recall", 0.7), certify=Certify())
        write_card(tmp_path / "card.json", card)
        again = read_card(str(tmp_path / "card.json"))
        assert (again.certificate, again.loss, again.allocation) == (card.certificate, card.loss, card.allocation)
        return tmp_path / "card.json"

    def test_nothing_is_overwritten(self, one: Set, path: Path) -> None:
        with pytest.raises(ArtifactError, match="exists"):
            write_card(path, read_card(path))
        with pytest.raises(ArtifactError, match="written as JSON"):
            write_card(path.with_name("card.yaml"), read_card(path))

    def test_another_schema(self, path: Path) -> None:
        value = json.loads(path.read_text())
        path.write_text(json.dumps(value | {"schema": 0}))
        with pytest.raises(ArtifactError, match="has schema 0; this version reads 1"):
            read_card(path)

    def test_bytes_of_another_unit(self, path: Path) -> None:
        value = json.loads(path.read_text())
        del value["bytes_of"]
        path.write_text(json.dumps(value))
        with pytest.raises(ArtifactError, match=r"counts bytes in the dtype of its model; .* weights of 16 bits"):
            read_card(path)

    def test_a_changed_number(self, path: Path) -> None:
        value = json.loads(path.read_text())
        value["sites"][0]["parameter"] += 1
        path.write_text(json.dumps(value))
        with pytest.raises(ArtifactError, match="was changed after it was written"):
            read_card(path)

    def test_a_flipped_bit_of_the_tensors(self, path: Path) -> None:
        file = path.with_suffix(".safetensors")
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        with pytest.raises(ArtifactError, match=r"is not the file that was written with card\.json"):
            read_card(path)
        file.unlink()
        with pytest.raises(ArtifactError, match="is missing"):
            read_card(path)

    def test_another_kind_and_parts_missing(self, path: Path) -> None:
        value = json.loads(path.read_text())
        del value["hash"]
        path.write_text(json.dumps(value))
        with pytest.raises(ArtifactError, match="'hash' is missing"):
            read_card(path)
        path.write_text("{}")
        with pytest.raises(ArtifactError, match="sparsity card"):
            read_card(path)

    def test_another_model(self, one: Set, path: Path) -> None:
        with pytest.raises(ArtifactError, match="was made for weights with the hash"):
            read_card(path).selectors(tiny("llama"))
        with pytest.raises(ArtifactError, match="are of other weights"):
            fit_card(tiny("llama"), one.traces, RULE, Target("recall", 0.9))


class TestProgress:
    @pytest.mark.parametrize(
        ("target", "options", "stages"),
        [
            (Target("recall", 0.8), {}, ("fit", "measure", "loss")),
            (PerplexityTarget(0.05), {}, ("fit", "choose", "measure", "loss")),
            (PerplexityTarget(0.9), {"certify": Certify("learn_then_test", 0.4)}, ("fit", "choose", "measure", "loss")),
            (Target("density", 0.5), {"allocation": "measured"}, ("fit", "choose", "measure", "loss")),
        ],
    )
    def test_every_stage_rises_to_what_it_said(
        self, one: Set, target: Any, options: dict[str, Any], stages: tuple[str, ...]
    ) -> None:
        calls: dict[str, list[tuple[int, int]]] = {}
        texts = CardTexts(one.windows, second_windows=one.windows)
        given = {"options": CardOptions(batch_size=2, **options), "texts": texts}
        fit_card(
            one.model, one.traces, RULE, target, **given, on_step=lambda s, *at: calls.setdefault(s, []).append(at)
        )
        assert tuple(calls) == stages
        for seen in calls.values():
            done, total = zip(*seen, strict=True)
            assert done[0] == 0 and list(done) == sorted(done) and done[-1] == total[0] > 0 and len(set(total)) == 1
        assert calls["loss"][-1][1] == 2 * (6 + 6 + 30)  # dense and sparse, on batches of two

    def test_batches_of_a_search(self, one: Set) -> None:
        ladder = ladder_of(PerplexityTarget(0.05), CardOptions(batch_size=2))
        found = most_batches(2, ladder, PerplexityTarget(0.05), CardOptions(batch_size=2), 12)
        assert found == 6 * (1 + 7)  # 99 densities and dense are halved at most seven times


class TestResume:
    def test_fitted_ffns_are_read_again(self, one: Set, tmp_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []

        def stop(stage: str, done: int, total: int) -> None:
            calls.append((stage, done, total))
            if stage == "fit" and done == 1:
                raise KeyboardInterrupt

        options = CardOptions(checkpoint=tmp_path / "parts")
        rule = SelectionRule("low_rank", "top_k", {"rank": 4, "epochs": 2})
        with pytest.raises(KeyboardInterrupt):
            fit_card(one.model, one.traces, rule, Target("recall", 0.8), options=options, on_step=stop)
        first = tmp_path / "parts" / "site_0000.safetensors"
        written = first.stat().st_mtime_ns
        card, _ = fit_card(one.model, one.traces, rule, Target("recall", 0.8), options=options)
        assert first.stat().st_mtime_ns == written
        whole, _ = fit_card(one.model, one.traces, rule, Target("recall", 0.8))
        assert card.sites == whole.sites
        fit_card(one.model, one.traces, rule, Target("recall", 0.7), options=options)
        assert first.stat().st_mtime_ns != written
        assert calls == [("fit", 0, 2), ("fit", 1, 2)]


def test_traces_without_tokens_are_refused(one: Set) -> None:
    empty: dict[str, torch.Tensor] = {**one.traces.parts, "calibrate": torch.tensor([10_000])}  # type: ignore[dict-item]
    traces: Traces = replace(one.traces, parts=empty)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no FFN of these traces has tokens"):
        fit_card(one.model, traces, RULE, Target("density", 0.5))
