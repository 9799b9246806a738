from __future__ import annotations

import math

import pytest
import torch

from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import DeviceError, NonFiniteError, UsageError
from ffnscope.evaluate import forward
from ffnscope.evaluate.perplexity import nll_sums, perplexity, protocol, token_nll, window_ratio


def slow_nll(model, windows: Windows) -> list[float]:
    """The definition, one window and one token at a time, without padding, in fp64."""
    sums = []
    for row, valid, targets in zip(windows.input_ids, windows.valid, windows.targets, strict=True):
        ids = row[valid]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        total = 0.0
        for t in range(1, len(ids)):
            if targets[t]:
                p = [math.exp(v) for v in logits[t - 1].tolist()]
                total -= math.log(p[ids[t]] / math.fsum(p))
        sums.append(total)
    return sums


@pytest.mark.parametrize("name", ["windows", "padded"])
def test_nll_equals_the_definition_in_fp64(model, name, request):
    text = request.getfixturevalue(name)
    model.double()
    nll, n = token_nll(model, text)
    assert nll.dtype == torch.float64
    assert nll.tolist() == pytest.approx(slow_nll(model, text), rel=1e-10)
    assert n.tolist() == text.targets.sum(1).tolist()


def test_nll_of_a_float32_model_is_close_to_the_definition(model, padded):
    nll, _ = token_nll(model, padded)
    assert nll.tolist() == pytest.approx(slow_nll(model.double(), padded), rel=1e-5)


def test_bfloat16_logits_are_widened_before_the_softmax(model, windows):
    logits = model(input_ids=windows.input_ids).logits.detach().bfloat16()
    assert torch.equal(nll_sums(logits, windows), nll_sums(logits.float(), windows))


def test_padded_rows_equal_the_same_rows_alone(model, padded):
    together, _ = token_nll(model, padded)
    for i, length in enumerate(padded.valid.sum(1).tolist()):
        alone, _ = token_nll(model, padded[slice(i, i + 1)].cut(length))
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-5)


def test_padding_tokens_do_not_matter(model, padded):
    other = torch.where(padded.valid, padded.input_ids, (padded.input_ids + 17) % 64)
    changed = Windows(other, padded.valid, padded.targets, padded.document, padded.source)
    assert torch.equal(token_nll(model, padded)[0], token_nll(model, changed)[0])


@pytest.mark.parametrize("name", ["windows", "padded"])
def test_batch_size_does_not_matter(model, name, request):
    text = request.getfixturevalue(name)
    one, *others = [perplexity(model, text, batch_size=size) for size in (1, 2, 3, 16)]
    for other in others:
        assert other.value == pytest.approx(one.value, rel=1e-5)
        assert other.stderr == pytest.approx(one.stderr, rel=1e-4)
        assert (other.n, other.protocol) == (one.n, one.protocol)


def test_chunk_size_does_not_matter(model, padded, monkeypatch):
    whole = token_nll(model, padded)[0]
    monkeypatch.setattr(forward, "CHUNK_VALUES", 64 * 3)
    torch.testing.assert_close(token_nll(model, padded)[0], whole, rtol=1e-6, atol=0)


def test_perplexity_is_token_weighted(model, padded):
    nll = slow_nll(model.double(), padded)
    found = perplexity(model, padded, batch_size=2)
    assert found.value == pytest.approx(math.exp(sum(nll) / padded.n_targets), rel=1e-9)
    assert (found.name, found.unit, found.n, found.dataset) == ("perplexity", "1", padded.n_targets, "padded rows")
    assert found.seed is None


@pytest.mark.parametrize("name", ["windows", "padded"])
def test_standard_error_by_direct_computation(model, name, request):
    text = request.getfixturevalue(name)
    nll, n = token_nll(model.double(), text)
    mean = nll.sum().item() / n.sum().item()
    residuals = [x - mean * m for x, m in zip(nll.tolist(), n.tolist(), strict=True)]
    k = len(text)
    variance = sum(r * r for r in residuals) / (k - 1) / k / (n.double().mean().item() ** 2)
    found = perplexity(model, text)
    assert found.stderr == pytest.approx(found.value * math.sqrt(variance), rel=1e-9)
    if name == "windows":  # equal windows: the standard error of the mean of their means
        means = nll / n
        assert found.stderr == pytest.approx(found.value * means.std().item() / math.sqrt(k), rel=1e-9)


def test_standard_error_agrees_with_the_spread_over_samples():
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 40, (4000, 50), generator=random)
    sums = counts * 2.0 + torch.randn(4000, 50, generator=random, dtype=torch.float64) * counts.double().sqrt() * 3
    found = [window_ratio(x, m) for x, m in zip(sums, counts, strict=True)]
    spread = torch.tensor([value for value, _ in found]).std().item()
    claimed = sum(stderr for _, stderr in found) / len(found)
    assert claimed == pytest.approx(spread, rel=0.05)


def test_one_window_has_no_standard_error_and_windows_without_targets_do_not_count():
    assert window_ratio(torch.tensor([6.0]), torch.tensor([3])) == (2.0, None)
    assert window_ratio(torch.tensor([6.0, 0.0]), torch.tensor([3, 0])) == (2.0, None)
    two = window_ratio(torch.tensor([6.0, 3.0]), torch.tensor([3, 3]))
    assert window_ratio(torch.tensor([6.0, 0.0, 3.0]), torch.tensor([3, 0, 3])) == two


def test_uniform_logits_give_the_vocabulary_size(model, windows):
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, windows)
    assert found.value == pytest.approx(64, rel=1e-6)
    assert found.stderr == pytest.approx(0, abs=1e-6)


def test_protocol_in_words(windows, padded):
    assert (
        protocol(windows) == "7 non-overlapping windows x 12 tokens, first token of each not predicted, token-weighted"
    )
    assert protocol(padded) == (
        "5 windows of at most 12 tokens, padding not counted, 27 of 36 tokens predicted, token-weighted"
    )


def test_model_is_left_as_it_was(model, windows):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    perplexity(model, windows, batch_size=3)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_progress_is_told(model, windows):
    seen = []
    perplexity(model, windows, batch_size=3, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nan_weight_is_named(model, windows):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"window 0 \(and 2 more of its batch\) of random tokens.*layers\.1\.mlp\.up_"
    ):
        perplexity(model, windows, batch_size=3)
    assert not model.training


def test_the_window_that_fails_is_named(model, windows):
    """A NaN that only one token meets."""
    ids = windows.input_ids.clone()
    ids[ids == 63] = 0
    ids[4, 5] = 63
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = math.inf
    with pytest.raises(NonFiniteError, match="window 4 of here has"):
        perplexity(model, contiguous_windows(ids, "here"), batch_size=3)


def test_float16_overflow_is_guessed(model, windows):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5).clamp_(-6e4, 6e4)
    with pytest.raises(
        NonFiniteError, match=r"float16 activation probably overflowed\. Load it in bfloat16 or float32"
    ):
        perplexity(model.half(), windows)


def test_activation_overflow_with_finite_weights(model, windows):
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38).clamp_(-3e38, 3e38)
    with pytest.raises(NonFiniteError, match=r"weights are finite, so an activation overflowed\. Evaluate in float32"):
        perplexity(model, windows)


def test_a_perplexity_beyond_floats_raises(model, windows):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    with pytest.raises(NonFiniteError, match=r"mean NLL on random tokens is .* too large for a float"):
        perplexity(model, windows)


def test_huge_but_finite_perplexity_is_a_number(model, windows):
    nll = token_nll(model, windows)[0].sum().item() / windows.n_targets
    with torch.no_grad():
        model.lm_head.weight.mul_(400 / nll)
    found = perplexity(model, windows)
    assert 1e50 < found.value < math.inf
    assert math.isfinite(found.stderr)


def test_no_target_and_bad_batch_size(model, windows):
    empty = Windows(windows.input_ids, windows.valid, windows.targets & False, windows.document, "nothing")
    with pytest.raises(UsageError, match=r"nothing: 7 window\(s\) with no token to predict"):
        perplexity(model, empty)
    with pytest.raises(UsageError, match="batch size must be at least 1; got 0"):
        perplexity(model, windows, batch_size=0)


def test_out_of_memory_in_the_forward_pass(model, windows):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.train()
    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(DeviceError, match=r"3 window\(s\) of 12 tokens at once; lower dataset\.batch_size"):
        perplexity(model, windows, batch_size=3)
    handle.remove()
    assert all(m.training for m in model.modules())
