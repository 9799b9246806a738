"""A masked model against constants put into h, padding and prompts told apart, and the model as it was."""

from __future__ import annotations

import pytest
import torch

from ffnscope.apply.replace import replaced
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.evaluate.perplexity import token_nll
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.evaluation import after_prompt, form_losses
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.masking import masked_by
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors.exact import oracle
from ffnscope.sparse.predictors.fixed import griffin, griffin_scores
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.predictors.low_rank import LowRank
from ffnscope.sparse.selector import Selector
from reference import exact, padded, text
from tiny import logits, tiny
from tiny_moe import tiny_moe


def oracles(model, k):
    return {site: Selector(oracle(ffn_of(model, site)), TopK(), k) for site in find_sites(model)}


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2", "opt", "gemma2"])
def test_a_constant_mask_is_a_constant_of_zero(arch) -> None:
    model, windows = exact(arch), text(4)
    kept = {s: torch.arange(s.d_ff) % 3 != 0 for s in find_sites(model)}
    with masked_by(model, {s: lambda x, m=m: m.expand(len(x), -1) for s, m in kept.items()}) as selected:
        selected.begin(windows)
        found, _ = token_nll(model, windows)
    removed = {s: (~m).nonzero().flatten() for s, m in kept.items()}
    with replaced(model, {s: (i, torch.zeros(len(i))) for s, i in removed.items()}):
        expected, _ = token_nll(model, windows)
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.allclose(found, token_nll(model, windows)[0], atol=1e-3)
    for site, density in selected.densities().items():
        assert density == pytest.approx(float(kept[site].double().mean()))


def test_padding_and_batches_do_not_matter() -> None:
    model, windows = exact("llama"), padded([16, 9, 12, 16, 5])
    form = MaskedForm("oracle", oracles(model, 5))
    one, many = (form_losses(model, form, windows, batch_size=size) for size in (1, 5))
    assert torch.allclose(one.nll, many.nll, atol=1e-8)
    assert one.densities == many.densities
    assert set(many.densities.values()) == {5 / find_sites(model)[0].d_ff}


def test_all_channels_are_the_dense_model_which_is_left_as_it_was() -> None:
    model, windows = tiny("llama"), text(4)
    before = logits(model)
    whole = form_losses(model, MaskedForm("all", oracles(model, 10**6)), windows)
    assert torch.equal(whole.nll, form_losses(model, None, windows).nll)
    with pytest.raises(RuntimeError, match="on purpose"), masked_by(model, oracles(model, 2)):
        raise RuntimeError("on purpose")
    assert torch.equal(before, logits(model))


class TestPrompts:
    def test_prompts_run_dense_and_do_not_count(self) -> None:
        model, windows = exact("llama"), padded([16, 9, 12])
        seen: list[int] = []

        def none(x):
            seen.append(len(x))
            return torch.zeros(len(x), site.d_ff, dtype=torch.bool)

        site = find_sites(model)[-1]
        form = MaskedForm("none", {site: none})
        found = form_losses(model, form, windows, prompt=8, batch_size=3)
        assert seen == [8 + 1 + 4]
        assert after_prompt(windows, 8).targets.sum(1).tolist() == [7, 0, 3]
        assert found.nll[1] == 0 and found.densities == {site: 0.0}

    def test_what_a_prompt_predicts_is_dense(self) -> None:
        model, windows = exact("llama"), text(3)
        site = find_sites(model)[0]
        begun = windows[:]
        begun.targets[:, 9:] = False  # the last is predicted by the last token of the prompt
        expected, _ = token_nll(model, begun)
        rule = {site: lambda x: torch.zeros(len(x), site.d_ff, dtype=torch.bool)}
        with masked_by(model, rule, prompt=8) as selected:
            selected.begin(begun)
            assert torch.allclose(token_nll(model, begun)[0], expected, atol=1e-10)
        with masked_by(model, rule, prompt=7) as selected:
            selected.begin(begun)
            assert not torch.allclose(token_nll(model, begun)[0], expected, atol=1e-4)

    def test_griffin_takes_the_channels_of_each_prompt(self) -> None:
        model, windows = exact("llama"), text(3)
        site = find_sites(model)[0]
        ffn, inputs = ffn_of(model, site), []
        handle = model.get_submodule(site.path).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        token_nll(model, windows)
        handle.remove()
        masks = []

        class Kept(TopK):
            def select(self, scores, parameter):
                masks.append(super().select(scores, parameter))
                return masks[-1]

        selector = Selector(griffin(ffn, FitTokens(inputs[0][0])), Kept(), 4)
        form_losses(model, MaskedForm("griffin", {site: selector}), windows, prompt=6, batch_size=3)
        assert [len(mask) for mask in masks] == [10, 10, 10]
        for mask, x in zip(masks, inputs[0], strict=True):
            best = griffin_scores(ffn, x[:6]).topk(4).indices
            assert mask[0].nonzero().flatten().tolist() == best.sort().values.tolist()

    def test_too_long(self) -> None:
        with pytest.raises(UsageError, match="no token to predict"):
            form_losses(tiny("llama"), None, text(2), prompt=15)

    def test_experts_have_none(self) -> None:
        model = tiny_moe("qwen2_moe")
        site = next(s for s in find_sites(model) if s.expert is not None and s.stacked)
        with pytest.raises(NotAvailableError, match="an expert"), masked_by(model, {site: lambda x: x}, prompt=1):
            pass


def test_no_selectors() -> None:
    with pytest.raises(UsageError, match="no selectors"), masked_by(tiny("llama"), {}):
        pass


def test_predictors_that_look_ahead() -> None:
    model = tiny("llama")
    site = find_sites(model)[1]
    selector = Selector(LowRank(ffn_of(model, site), 4, relu=True, lookahead=1), TopK(), 3)
    with pytest.raises(NotAvailableError, match="looks ahead"), masked_by(model, {site: selector}):
        pass
