"""The measured loss change of removed channels equals that of whole masked forwards, on every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.analyze import ablation
from ffnscope.analyze.ablation import ablate_channels, joint_change
from ffnscope.analyze.suffix import prefix_of
from ffnscope.apply.mask import masked
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.evaluate.forward import batch_logits
from ffnscope.evaluate.perplexity import token_losses
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_json
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import Budget, FFNSite, PruningPlan
from tiny import tiny, tokens
from tiny_moe import tiny_moe

EXPERTS = ("mixtral", "llama4_text", "dbrx", "deepseek_v3")


def windows(rows: int = 5, length: int = 12) -> Windows:
    return contiguous_windows(tokens(rows, length), "random tokens", torch.tensor([0, 0, 1, 2, 2][:rows]))


def model_of(name: str, **changes: Any) -> Any:
    build = tiny_moe if name in EXPERTS else tiny
    return build(name, dtype=torch.float64, **changes)


def some_channels(model: Any, k: int = 3) -> dict[FFNSite, Tensor]:
    return {site: torch.tensor([0, site.d_ff // 2, site.d_ff - 1][:k]) for site in find_sites(model)}


def without(site: FFNSite, channel: int) -> PruningPlan:
    kept = [c for c in range(site.d_ff) if c != channel]
    return PruningPlan({site: torch.tensor(kept)}, "by hand", "local", Budget(0.1))


def brute_force(model: Any, site: FFNSite, channel: int, text: Windows) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each window of the change of the NLL, and of its absolute value."""
    dense = token_losses(batch_logits(model, text), text)
    with masked(model, without(site, channel)):
        change = token_losses(batch_logits(model, text), text) - dense
    return change.sum(1), change.abs().sum(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gpt_neox", "phi3", "gemma2", *EXPERTS])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_single_channels_equal_brute_force(name: str, batch_size: int) -> None:
    model, text = model_of(name), windows()
    found = ablate_channels(model, some_channels(model), text, batch_size=batch_size)
    assert found.whole == ()
    for site, channels in found.channels.items():
        for i, channel in enumerate(channels.tolist()):
            change, moved = brute_force(model, site, channel, text)
            torch.testing.assert_close(found.change[site][i], change, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.moved[site][i], moved, rtol=1e-4, atol=1e-6)
    assert max(float(value.abs().max()) for value in found.moved.values()) > 1e-3


def test_means_over_all_windows_and_over_some(llama: Any) -> None:
    text = windows()
    found = ablate_channels(llama, some_channels(llama, 2), text)
    site = find_sites(llama)[1]
    some = torch.tensor([True, True, False, False, False])
    assert found.n_targets.tolist() == [11] * 5
    assert found.document.tolist() == [0, 0, 1, 2, 2]
    torch.testing.assert_close(found.loss_change()[site], found.change[site].sum(1) / 55)
    torch.testing.assert_close(found.token_change(some)[site], found.moved[site][:, :2].sum(1) / 22)
    with pytest.raises(UsageError, match="no token is predicted in the chosen windows"):
        found.loss_change(torch.zeros(5, dtype=torch.bool))


def test_padding_is_not_counted(llama: Any) -> None:
    text = windows(2)
    valid = torch.ones_like(text.input_ids, dtype=torch.bool)
    valid[0, 7:] = False
    targets = valid.clone()
    targets[:, 0] = False
    padded = Windows(text.input_ids, valid, targets, text.document, "padded")
    site = find_sites(llama)[1]
    (found,) = ablate_channels(llama, {site: torch.tensor([3])}, padded).change.values()
    (short,) = ablate_channels(llama, {site: torch.tensor([3])}, text[:1].cut(7)).change.values()
    torch.testing.assert_close(found[0, 0], short[0, 0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_joint_removal_equals_masked(name: str) -> None:
    model, text = model_of(name), windows()
    sites = find_sites(model)
    dense = token_losses(batch_logits(model, text), text).sum(1)
    for chosen in (sites, [site for site in sites if site.layer == 1]):
        plan = build_plan(score(model, chosen, "random", seed=1), 0.4)
        with masked(model, plan):
            expected = token_losses(batch_logits(model, text), text).sum(1) - dense
        torch.testing.assert_close(joint_change(model, plan, text, batch_size=2), expected, rtol=1e-6, atol=1e-9)
    assert joint_change(model, build_plan(score(model, sites, "random"), 0.0), text).abs().max() == 0


def test_only_the_blocks_from_the_site_on_run_again(llama: Any) -> None:
    text, site, calls = windows(2), find_sites(llama)[1], [0, 0]
    for i, block in enumerate(llama.model.layers):
        block.self_attn.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    ablate_channels(llama, {site: torch.arange(8)}, text, batch_size=4)
    first, second = calls
    ablate_channels(llama, {site: torch.arange(16)}, text, batch_size=4)
    assert calls[0] - first == first  # as often for twice the channels
    assert calls[1] - second > second
    assert vars(llama.model.layers[0]).get("forward") is None


def test_blocks_of_one_layer_are_no_prefix(llama: Any) -> None:
    sites = find_sites(llama)
    assert len(prefix_of(llama, [sites[1]]).blocks) == 1
    assert prefix_of(llama, sites).blocks == prefix_of(llama, [sites[0]]).blocks == []


def test_a_side_channel_between_blocks_makes_the_whole_model_run(llama: Any) -> None:
    """The second block reads what the first stored: skipping the first would leave that out."""
    store: list[Tensor] = []
    first, second = llama.model.layers
    site = find_sites(llama)[1]

    def keep(module: Any, args: Any, output: Tensor) -> None:
        store[:] = [output.mean(-1, keepdim=True).sin()]

    def use(module: Any, args: Any) -> Any:
        return (args[0] + store.pop() if store else args[0], *args[1:])

    first.mlp.register_forward_hook(keep)
    second.register_forward_pre_hook(use)
    text = windows(2)
    found = ablate_channels(llama, {site: torch.tensor([0, 5])}, text)
    assert found.whole == (site.name,)
    store.clear()
    for i, channel in enumerate((0, 5)):
        change, _ = brute_force(llama, site, channel, text)
        torch.testing.assert_close(found.change[site][i], change, rtol=1e-3, atol=1e-5)
    plan = build_plan(score(llama, [site], "random"), 0.5)
    dense = token_losses(batch_logits(llama, text), text).sum(1)
    with masked(llama, plan):
        expected = token_losses(batch_logits(llama, text), text).sum(1) - dense
    torch.testing.assert_close(joint_change(llama, plan, text), expected, rtol=1e-3, atol=1e-5)


def test_progress_and_a_continued_measurement(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, told, state = windows(), [], tmp_path / "state.json"
    chosen = some_channels(llama)
    whole = ablate_channels(llama, chosen, text, batch_size=2, on_tokens=lambda *now: told.append(now))
    assert told[-1] == (6 * text.n_tokens, 6 * text.n_tokens)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    real, calls = ablation._losses_without, []

    def stopped(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ablation, "_losses_without", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate_channels(llama, chosen, text, batch_size=2, state=state)
    assert read_json(state)["n_windows"] == 5
    found = ablate_channels(llama, chosen, text, batch_size=2, state=state, on_tokens=lambda *now: told.append(now))
    assert len(calls) == 12 + 2 * 2 * 5 - 11  # two sites, two forwards for three channels, five windows
    assert told[-1] == (6 * text.n_tokens, 6 * text.n_tokens)
    for site in chosen:
        torch.testing.assert_close(found.change[site], whole.change[site], rtol=1e-4, atol=1e-6)
    state.write_text("{")
    with pytest.raises(ArtifactError, match="Delete it, and everything is measured anew"):
        ablate_channels(llama, chosen, text, state=state)


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        ([], "there is no channel to remove"),
        ([0, 0], "expected distinct int64 indices"),
        ([-1], r"must be in \[0, 48\); got -1 to -1"),
        ([47, 48], r"must be in \[0, 48\); got 47 to 48"),
        ([0.5], "expected distinct int64 indices"),
    ],
)
def test_refused_channels(llama: Any, channels: list[float], text: str) -> None:
    site = find_sites(llama)[0]
    with pytest.raises(UsageError, match=text):
        ablate_channels(llama, {site: torch.tensor(channels)}, windows())


def test_refusals(llama: Any) -> None:
    site = find_sites(llama)[0]
    with pytest.raises(UsageError, match="there is no channel to remove"):
        ablate_channels(llama, {}, windows())
    with pytest.raises(UsageError, match="batch size must be at least 1; got 0"):
        ablate_channels(llama, {site: torch.tensor([0])}, windows(), batch_size=0)
    with pytest.raises(UsageError, match="the plan was made for"):
        ablate_channels(tiny("llama", intermediate_size=64), {site: torch.tensor([0])}, windows())


def test_the_model_is_bit_identical_afterwards(llama: Any) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    ablate_channels(llama.train(), some_channels(llama), windows())
    assert llama.training
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in llama.modules())
