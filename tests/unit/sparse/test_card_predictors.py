"""Cards of predictors that look ahead, of prompts, of pruning plans and of files: fitted, kept, decoded by, resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from card_sets import Set
from ffnscope.budget import Budget
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import ArtifactError, NotAvailableError, UnknownNameError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_plan, write_plan
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import SparsityCard, WantedChannels
from ffnscope.sparse.card_curve import card_curve
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.card_options import ParameterTarget
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.labels import top_mass
from ffnscope.sparse.masking import masked_by
from ffnscope.sparse.monitor import Monitor, MonitorOptions
from ffnscope.sparse.placement.selections import card_selections
from ffnscope.sparse.predictors import fixed, training
from ffnscope.sparse.predictors.fc_files import write_fc_predictors
from ffnscope.sparse.predictors.fixed import griffin_scores
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.predictors.low_rank import LowRank
from ffnscope.sparse.prompts import begin_prompt
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.runtime import Runtime, unwrap_, wrap_
from ffnscope.sparse.selector import HandsOn
from ffnscope.sparse.site_params import check_predictor_params, ffn_norms
from ffnscope.types import PruningPlan
from tiny import D_FF, HIDDEN, tiny

HALF = Target("density", 0.5)
TRAINED = {"rank": 4, "epochs": 2}
QUIET = MonitorOptions(audit_every=None, fallback=False)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("card"))


def kept(card: SparsityCard, folder: Path) -> SparsityCard:
    """The card as a file gives it back."""
    write_card(folder / "card.json", card, overwrite=True)
    return read_card(folder / "card.json")


@torch.no_grad()
def masked_logits(one: Set, card: SparsityCard, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last token where the first ``prompt`` tokens run dense, by the definition."""
    windows = contiguous_windows(ids, "one prompt")
    with masked_by(one.model, card.selectors(one.model), prompt) as selected:
        selected.begin(windows)
        return one.model(input_ids=ids, use_cache=False).logits[0, -1]


@torch.no_grad()
def decoded_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of the last token, decoded after the others as the prompt."""
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]


def decoded_as_expected(runtime: Runtime, model: Any, ids: Tensor, expected: Tensor) -> Monitor:
    """Decode with a wrapped model, unwrap it, compare the logits; what has monitored it."""
    try:
        found = decoded_logits(model, ids)
        monitor = runtime.monitor
    finally:
        unwrap_(model)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert monitor is not None
    return monitor


class TestLookahead:
    RULE = SelectionRule("low_rank", "top_k", {**TRAINED, "lookahead": 1})

    @pytest.fixture
    def card(self, one: Set, tmp_path: Path) -> SparsityCard:
        return kept(one.fit(self.RULE, HALF), tmp_path)

    def test_the_input_one_layer_before_decides(self, one: Set, card: SparsityCard) -> None:
        first, second = card.sites
        assert first.source is None and second.source == first.site
        selectors = card.selectors(one.model)
        predictor = selectors[second.site].predictor
        assert predictor.lookahead == 1 and selectors[first.site].predictor.lookahead == 0
        ids = one.windows.input_ids[:1]
        inputs: dict[Any, Tensor] = {}
        handles = [
            one.model.get_submodule(row.site.path).register_forward_pre_hook(
                lambda m, args, site=row.site: inputs.__setitem__(site, args[0][0])
            )
            for row in card.sites
        ]
        with masked_by(one.model, selectors) as selected, torch.no_grad():
            one.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        mask = selectors[second.site].of_scores(predictor(inputs[first.site]))
        assert selected.channels[second.site] == int(mask.sum())
        assert predictor(inputs[first.site]).ne(predictor(inputs[second.site])).any()

    def test_figures_are_of_these_inputs(self, one: Set, card: SparsityCard) -> None:
        first, second = card.sites
        selector = card.selectors(one.model)[second.site]
        x, earlier = one.traces.x(second.site, "test"), one.traces.x(first.site, "test")
        mask = selector.of_scores(selector.predictor(earlier))
        wanted = WantedChannels().label(selector.predictor.ffn.contributions(x))
        recall = float(((mask & wanted).sum(1) / wanted.sum(1)).mean())
        assert second.figures["test"]["recall"].mean == pytest.approx(recall)

    @pytest.mark.parametrize("first_dense", [False, True])
    def test_decoding_is_the_definition(self, one: Set, card: SparsityCard, first_dense: bool) -> None:
        if first_dense:
            first = replace(card.sites[0], parameter=None, density=1.0, bands={})
            card = replace(card, sites=(first, *card.sites[1:]))
        ids = one.windows.input_ids[:1, :9]
        expected = masked_logits(one, card, ids, 8)
        runtime = wrap_(one.model, card, break_even=1.0, monitor=QUIET)
        monitor = decoded_as_expected(runtime, one.model, ids, expected)
        assert isinstance(monitor.selectors[card.sites[0].site], HandsOn) == first_dense
        levels = [runtime.levels[row.site] for row in card.sites]
        assert levels == ["masked" if first_dense else "module", "module"]
        assert runtime.copied_bytes == (1 if first_dense else 2) * 4 * D_FF * HIDDEN
        assert len(monitor.report()) == (1 if first_dense else 2)

    @pytest.mark.parametrize("slow", [0, 1])
    def test_left_dense_the_input_is_handed_on_still(
        self, one: Set, card: SparsityCard, slow: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = card.sites[slow].site
        monkeypatch.setattr(Runtime, "_pays", lambda self, s, *rest: s != site)
        dense = replace(card.sites[slow], parameter=None, density=1.0, bands={})
        ids = one.windows.input_ids[:1, :9]
        sites = tuple(dense if s.site == site else s for s in card.sites)
        expected = masked_logits(one, replace(card, sites=sites), ids, 8)
        with pytest.warns(UserWarning, match="left dense in LlamaForCausalLM"):
            runtime = wrap_(one.model, card, monitor=QUIET, never_slower=True)
        monitor = decoded_as_expected(runtime, one.model, ids, expected)
        assert len(monitor.report()) == 1
        first, second = (s.site for s in card.sites)
        assert runtime.levels == ({first: "masked", second: "module"} if slow == 0 else {first: "module"})
        assert runtime.copied_bytes == 4 * D_FF * HIDDEN  # down of the FFN that reads rows

    def test_no_placement(self, one: Set, card: SparsityCard) -> None:
        with pytest.raises(NotAvailableError, match=r"predictors of this card \(low_rank\) look ahead"):
            card_selections(one.model, card)

    def test_a_selector_alone_says_what_it_lacks(self, one: Set, card: SparsityCard) -> None:
        site = card.sites[1].site
        with pytest.raises(NotAvailableError, match=r"layers\.0\.mlp, one layer before, which nothing has handed on"):
            card.selectors(one.model)[site](one.traces.x(site, "test"))

    def test_a_curve(self, one: Set, card: SparsityCard) -> None:
        rows = card_curve(one.model, one.traces, card, one.windows, [0.5])
        own, whole = rows[1], rows[-1]
        assert own.label == "low_rank, top_k" and own.perplexity.value == pytest.approx(whole.perplexity.value)

    def test_no_fisher(self, one: Set) -> None:
        with pytest.raises(UsageError, match="'fisher' weighs errors on each FFN's own inputs, and low_rank looks"):
            one.fit(self.RULE, HALF, allocation="fisher")


class TestPrompts:
    RULE = SelectionRule("griffin", "top_k", {"prompt": 6})

    @pytest.fixture
    def card(self, one: Set, tmp_path: Path) -> SparsityCard:
        return kept(one.fit(self.RULE, HALF), tmp_path)

    def test_figures_are_of_what_follows_each_prompt(self, one: Set, card: SparsityCard) -> None:
        row, recalls = card.sites[0], []
        selector = card.selectors(one.model)[row.site]
        ffn = selector.predictor.ffn
        tokens = one.traces.fit_tokens(row.site, "test")
        assert tokens.window is not None
        for window in tokens.window.unique().tolist():
            x = tokens.x[tokens.window == window]
            scores = griffin_scores(ffn, x[:6])
            mask = torch.zeros(ffn.d_ff, dtype=torch.bool).index_fill_(0, scores.topk(ffn.d_ff // 2).indices, True)
            wanted = top_mass(ffn.contributions(x[6:]), 0.1)
            recalls.append((mask & wanted).sum(1) / wanted.sum(1))
        assert row.figures["test"]["recall"].mean == pytest.approx(float(torch.cat(recalls).mean()))
        assert card.facts["prompt"] == 6 and card.tensors == {}

    def test_decoding_takes_the_channels_of_the_prompt(self, one: Set, card: SparsityCard) -> None:
        ids = one.windows.input_ids[:1, :9]
        expected = masked_logits(one, card, ids, 8)
        runtime = wrap_(one.model, card, break_even=1.0, monitor=QUIET, never_slower=False)
        try:
            with pytest.raises(NotAvailableError, match=r"Call ffnscope\.begin_prompt"):
                decoded_logits(one.model, ids)
            with pytest.raises(UsageError, match="of one prompt"):
                begin_prompt(one.model, ids.repeat(2, 1), runtime)
            begin_prompt(one.model, ids[:, :8], runtime)
            found = decoded_logits(one.model, ids)
        finally:
            unwrap_(one.model)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    def test_no_placement(self, one: Set, card: SparsityCard) -> None:
        with pytest.raises(NotAvailableError, match=r"of this card \(griffin\) take their scores from a"):
            card_selections(one.model, card)

    def test_only_cards_of_prompts_take_one(self, one: Set) -> None:
        runtime = wrap_(one.model, one.fit(target=HALF), break_even=1.0)
        try:
            with pytest.raises(UsageError, match="no selection of prompts"):
                begin_prompt(one.model, one.windows.input_ids[:1, :4], runtime)
        finally:
            unwrap_(one.model)

    def test_losses_leave_the_prompt_out(self, one: Set, card: SparsityCard) -> None:
        plain = one.fit(target=HALF)
        held = one.traces.windows_of(one.windows, "test")
        assert card.loss["test"].n_targets == plain.loss["test"].n_targets - 6 * len(held)

    def test_every_policy(self, one: Set) -> None:
        for policy in ("threshold", "nucleus", "channel_threshold", "hybrid"):
            card = one.fit(SelectionRule("griffin", policy, {"prompt": 6}), Target("recall", 0.9))
            assert card.figures["calibrate"]["recall"].mean >= 0.9

    def test_a_prompt_as_long_as_the_windows(self, one: Set) -> None:
        with pytest.raises(UsageError, match="no window has a token after a prompt of 16"):
            one.fit(SelectionRule("griffin", "top_k", {"prompt": 16}), HALF)


class TestPlans:
    @pytest.fixture
    def plan(self, one: Set, tmp_path: Path) -> Path:
        indices = {site: torch.arange(5 + site.layer, 29) for site in find_sites(one.model)}
        write_plan(tmp_path / "plan.json", PruningPlan(indices, "wanda", "local", Budget(0.4)))
        return tmp_path / "plan.json"

    def test_it_is_the_selection(self, one: Set, plan: Path, tmp_path: Path) -> None:
        rule = SelectionRule("static", "threshold", {"plan": str(plan)})
        card = kept(one.fit(rule, ParameterTarget(1.0)), tmp_path)
        assert card.target == ("parameter", 1.0)
        plan.unlink()  # the card holds it
        for site, selector in card.selectors(one.model).items():
            mask = selector(one.traces.x(site)[:2])
            assert mask.nonzero()[:, 1].tolist() == 2 * list(range(5 + site.layer, 29))
        assert [round(row.density * row.site.d_ff, 9) for row in card.sites] == [24, 23]

    def test_the_file_is_read_once_as_long_as_it_stays(
        self, one: Set, plan: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[Path] = []
        monkeypatch.setattr(fixed, "read_plan", lambda path: (read.append(path), read_plan(path))[1])
        names = [site.name for site in find_sites(one.model)]
        SelectionRule("low_bit", "hybrid", {}, {"core": str(plan)}).check_core(names)
        static = SelectionRule("static", "threshold", {"plan": str(plan)})
        check_predictor_params(static, one.model, find_sites(one.model))
        fixed.kept_by(plan, names[0]).zero_()  # the caller's own
        assert fixed.kept_by(plan, names[0]).tolist() == list(range(5, 29)) and read == [plan]
        write_plan(plan, PruningPlan({site: torch.arange(3) for site in find_sites(one.model)}, "w", "a", Budget(0.4)))
        assert fixed.kept_by(plan, names[0]).tolist() == [0, 1, 2] and read == [plan, plan]

    def test_an_edited_plan_is_fitted_again(self, one: Set, plan: Path, tmp_path: Path) -> None:
        rule = SelectionRule("static", "threshold", {"plan": str(plan)})
        first = rule.identity()
        indices = {site: torch.arange(3) for site in find_sites(one.model)}
        write_plan(plan, PruningPlan(indices, "wanda", "local", Budget(0.4)))
        assert rule.identity() != first

    def test_refused(self, one: Set, plan: Path, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="does not exist; a parameter names it"):
            one.fit(SelectionRule("static", "threshold", {"plan": "nowhere.json"}), ParameterTarget(1.0))
        site = find_sites(one.model)[0]
        write_plan(plan, PruningPlan({site: torch.arange(3)}, "wanda", "local", Budget(0.4)))
        with pytest.raises(UnknownNameError, match=r"Unknown FFN of the plan .*'model.layers.1.mlp'"):
            one.fit(SelectionRule("static", "threshold", {"plan": str(plan)}), ParameterTarget(1.0))
        with pytest.raises(UsageError, match="is taken as it is, so nothing can be promised or allocated"):
            one.fit(target=ParameterTarget(1.0), allocation="measured")


class TestTraining:
    RULE = SelectionRule("low_rank", "top_k", {"rank": {"model.layers.0.mlp": 3, "*": 5}, "epochs": 4, "patience": 4})

    def test_ranks_by_name(self, one: Set) -> None:
        card = one.fit(self.RULE, HALF)
        ranks = [len(card.tensors[f"{row.site.name}/predictor/fc1.weight"]) for row in card.sites]
        assert ranks == [3, 5]
        with pytest.raises(UnknownNameError, match=r"FFN in rank of predictor 'low_rank' 'model.layers.0.mpl'. Did"):
            one.fit(SelectionRule("low_rank", "top_k", {"rank": {"model.layers.0.mpl": 3, "*": 4}}), HALF)
        with pytest.raises(UsageError, match=r"rank names no number for model\.layers\.1\.mlp"):
            one.fit(SelectionRule("low_rank", "top_k", {"rank": {"model.layers.0.mlp": 3}}), HALF)

    def test_a_training_that_was_cut_off_goes_on(self, one: Set, tmp_path: Path) -> None:
        unbroken = one.fit(self.RULE, HALF)
        told: list[tuple[str, int, int]] = []

        def cut(site: Any, done: int, most: int, missed: float) -> None:
            told.append((site.name, done, most))
            if len(told) == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            one.fit(self.RULE, HALF, checkpoint=tmp_path, on_epoch=cut)
        assert told[0] == ("model.layers.0.mlp", 1, 4) and told[-1] == ("model.layers.1.mlp", 2, 4)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"site_0000.safetensors", "training_0001.safetensors"}
        card = one.fit(
            self.RULE, HALF, checkpoint=tmp_path, on_epoch=lambda site, *at: told.append((site.name, *at[:2]))
        )
        assert told[6:] == [("model.layers.1.mlp", 3, 4), ("model.layers.1.mlp", 4, 4)]
        assert not list(tmp_path.glob("training_*"))
        assert all(torch.equal(card.tensors[name], value) for name, value in unbroken.tensors.items())

    @pytest.mark.parametrize(
        ("target", "share"),
        [(HALF, 0.5), (Target("recall", 0.9), None), (Target("missed_mass", 0.3), None), (ParameterTarget(0.5), 0.3)],
    )
    def test_the_density_is_that_of_the_target(
        self, one: Set, target: Any, share: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[float] = []

        def note(made: LowRank, fit: FitTokens, options: Any, **more: Any) -> Any:
            seen.append(options.density)
            return train(made, fit, options, **more)

        train = training.train_low_rank
        monkeypatch.setattr(training, "train_low_rank", note)
        rule = SelectionRule("low_rank", "threshold", TRAINED)
        card, _ = fit_card(one.model, one.traces, rule, target)
        if share is None:  # the mean density of the fewest channels that meet the target
            missed = 0.1 if target.measure == "recall" else target.value
            site = card.sites[0].site
            known = card.restored(one.model, card.sites[0])
            assert known is not None
            share = float(top_mass(known[0].ffn.contributions(one.traces.x(site, "fit")), missed).double().mean())
        assert seen[0] == pytest.approx(share)
        fit_card(one.model, one.traces, SelectionRule("low_rank", "threshold", {**TRAINED, "density": 0.2}), target)
        assert seen[-1] == 0.2

    def test_deja_vu_has_its_loss(self, one: Set) -> None:
        with pytest.raises(UsageError, match="deja_vu is trained by its published loss"):
            one.fit(SelectionRule("deja_vu", "top_k", {**TRAINED, "loss": "mass"}), HALF)


class TestFiles:
    def test_norms_are_those_before_the_ffn(self) -> None:
        model = tiny("llama")
        random = torch.Generator().manual_seed(0)
        for block in model.model.layers:
            block.post_attention_layernorm.weight.data = torch.rand(32, generator=random) + 0.5
        for site, weight in ffn_norms(model, find_sites(model)).items():
            expected = model.model.layers[site.layer].post_attention_layernorm.weight.double()
            assert torch.allclose(weight / weight.mean(), expected / expected.mean(), rtol=1e-3)

    def test_a_norm_with_a_mean_is_refused(self) -> None:
        model = tiny("gpt_neox")
        with pytest.raises(NotAvailableError, match="no RMS norm right before"):
            ffn_norms(model, find_sites(model))

    @pytest.mark.parametrize("before_norm", [True, False])
    def test_a_card_of_files_selects_as_the_predictors(self, one: Set, before_norm: bool, tmp_path: Path) -> None:
        trained = one.fit(SelectionRule("low_rank", "top_k", TRAINED), HALF)
        made = [known[0] for row in trained.sites if (known := trained.restored(one.model, row)) is not None]
        sites = [row.site for row in trained.sites]
        norms = list(ffn_norms(one.model, sites).values()) if before_norm else None
        write_fc_predictors(tmp_path / "fc", made, norms)  # type: ignore[arg-type]
        params = {"folder": str(tmp_path / "fc")} | ({} if before_norm else {"before_norm": False})
        card = kept(one.fit(SelectionRule("fc_files", "top_k", params), HALF), tmp_path)
        x = one.traces.x(sites[1], "test")
        own, other = (c.selectors(one.model)[sites[1]] for c in (card, trained))
        assert torch.allclose(own.score_and_read(x)[0], other.score_and_read(x)[0], atol=1e-5)
        found = card.figures["test"]["recall"].mean
        assert found == pytest.approx(trained.figures["test"]["recall"].mean, abs=1e-3)
        with pytest.raises(ArtifactError, match="nowhere does not exist"):
            one.fit(SelectionRule("fc_files", "top_k", {"folder": "nowhere"}), HALF)
        (tmp_path / "fc" / "model_1.pt").unlink()
        with pytest.raises(ArtifactError, match=r"model_1.pt does not exist"):
            one.fit(SelectionRule("fc_files", "top_k", params), HALF)

    def test_files_with_nan(self, one: Set, tmp_path: Path) -> None:
        site = find_sites(one.model)[0]
        state = {"fc1.weight": torch.full((2, site.d_model), float("nan")), "fc2.weight": torch.zeros(site.d_ff, 2)}
        for layer in (0, 1):
            torch.save(state, tmp_path / f"model_{layer}.pt")
        with pytest.raises(ArtifactError, match=r"fc1.weight of .*model_0.pt holds NaN"):
            one.fit(SelectionRule("fc_files", "top_k", {"folder": str(tmp_path)}), HALF)

    def test_a_predictor_of_a_dense_ffn_is_kept(self, one: Set) -> None:
        card = one.fit(SelectionRule("low_rank", "top_k", TRAINED), Target("density", 0.99))
        assert all(row.dense for row in card.sites) and card.restored(one.model, card.sites[0]) is not None
