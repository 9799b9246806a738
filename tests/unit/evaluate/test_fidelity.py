from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from ffnscope.errors import UsageError
from ffnscope.evaluate import forward
from ffnscope.evaluate.fidelity import fidelity


@pytest.fixture
def logits():
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 6, 50, generator=random) * 3
    pruned = dense + torch.randn(3, 6, 50, generator=random)
    targets = torch.rand(3, 6, generator=random) < 0.6
    targets[:, 0] = False
    return dense, pruned, targets


def direct(dense, pruned, targets):
    """KL by torch, in fp64, per window."""
    log_p, log_q = (v.double().log_softmax(-1) for v in (dense, pruned))
    each = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (each[:, :-1] * targets[:, 1:]).sum(1)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_kl_equals_torch(logits, dtype, rel):
    dense, pruned, targets = logits
    kl, _ = fidelity(dense.to(dtype), pruned.to(dtype), targets)
    assert kl.dtype == torch.float64
    torch.testing.assert_close(kl, direct(*logits), rtol=rel, atol=0)


def test_kl_is_of_dense_against_pruned(logits):
    dense, pruned, targets = logits
    kl, _ = fidelity(dense, pruned, targets)
    assert not torch.allclose(kl, direct(pruned, dense, targets), rtol=1e-2)


def test_agreement_counts_equal_first_tokens(logits):
    dense, pruned, targets = logits
    same = (dense.argmax(-1) == pruned.argmax(-1))[:, :-1] & targets[:, 1:]
    _, agree = fidelity(dense, pruned, targets)
    assert agree.tolist() == same.sum(1).tolist()
    assert 0 < agree.sum() < targets.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identical_logits_give_exactly_zero(logits, dtype):
    dense, _, targets = logits
    kl, agree = fidelity(dense.to(dtype), dense.to(dtype).clone(), targets)
    assert kl.tolist() == [0.0, 0.0, 0.0]
    assert agree.tolist() == targets.sum(1).tolist()


def test_small_differences_survive_float32():
    """The plain float32 sum is off by as much as a KL of 5e-7 nats; ours is not."""
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(32, 2, 20000, generator=random) * 3
    pruned = dense + torch.randn(32, 2, 20000, generator=random) * 1e-3
    targets = torch.tensor([[False, True]]).expand(32, 2)
    true = direct(dense, pruned, targets)
    kl, _ = fidelity(dense, pruned, targets)
    log_p, log_q = dense[:, 0].log_softmax(-1), pruned[:, 0].log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    assert (kl - true).abs().max() < 0.05 * true.mean()
    assert (plain - true).abs().max() > 0.5 * true.mean()


def test_shifted_logits_are_the_same_prediction(logits):
    dense, _, targets = logits
    kl, _ = fidelity(dense, dense + 100.0, targets)
    assert (kl >= 0).all()
    assert kl.max() < 1e-7


def test_excluded_tokens(logits):
    """Probability 0 in both is no difference; excluding what the dense model allows is an infinite one."""
    dense, pruned, targets = (v.clone() for v in logits)
    dense[..., 7] = pruned[..., 7] = -torch.inf
    kl, _ = fidelity(dense, pruned, targets)
    keep = [v for v in range(50) if v != 7]
    torch.testing.assert_close(kl, direct(dense[..., keep], pruned[..., keep], targets), rtol=1e-5, atol=0)
    pruned[..., 3] = -torch.inf
    assert fidelity(dense, pruned, targets)[0].isinf().all()


def test_chunk_size_does_not_matter(logits, monkeypatch):
    whole = fidelity(*logits)
    monkeypatch.setattr(forward, "CHUNK_VALUES", 100)
    parts = fidelity(*logits)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=0)
    assert torch.equal(parts[1], whole[1])


def test_arguments_unchanged(logits):
    before = [v.clone() for v in logits]
    fidelity(*logits)
    assert all(torch.equal(a, b) for a, b in zip(before, logits, strict=True))


def test_shapes_must_agree(logits):
    dense, pruned, targets = logits
    with pytest.raises(UsageError, match=r"got dense \(3, 6, 50\), pruned \(3, 6, 49\) and targets \(3, 6\)"):
        fidelity(dense, pruned[..., :-1], targets)
