from __future__ import annotations

import pytest
import torch

from ffnscope.errors import DeviceError
from ffnscope.evaluate import forward
from ffnscope.evaluate.forward import batch_logits, chunk_logits, evaluating, memory_errors, target_chunks


def test_evaluating_gives_each_module_its_own_mode_back(model):
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyboardInterrupt
    assert [m.training for m in model.modules()] == before
    assert len(set(before)) == 2


@pytest.mark.parametrize(
    ("n_windows", "cure"), [(4, r"lower dataset\.batch_size \(batch_size\)\."), (1, "use shorter windows")]
)
def test_out_of_memory_names_what_to_lower(n_windows, cure):
    with (
        pytest.raises(DeviceError, match=rf"{n_windows} window\(s\) of 512 tokens.*{cure}"),
        memory_errors(n_windows, 512),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_mask_is_passed_only_with_padding_and_never_a_cache(model, windows, padded):
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch_logits(model, windows)
    batch_logits(model, padded)
    batch_logits(model, padded[slice(0, 1)])
    handle.remove()
    assert ["attention_mask" in kwargs for kwargs in seen] == [False, True, False]
    assert torch.equal(seen[1]["attention_mask"].bool(), padded.valid)
    assert all(kwargs["use_cache"] is False for kwargs in seen)


def test_logits_have_no_graph(model, windows):
    assert not batch_logits(model, windows).requires_grad


def test_chunks_cover_every_target_once_and_stay_bounded(padded, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_VALUES", 64 * 4)
    parts = list(target_chunks(padded.targets, torch.empty(1, 1, 64)))
    assert max(len(rows) for rows, _ in parts) == 4
    assert sum(len(rows) for rows, _ in parts) == padded.n_targets
    seen = torch.zeros_like(padded.targets)
    for rows, columns in parts:
        seen[rows, columns] = True
    assert torch.equal(seen, padded.targets)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_chunk_logits_are_those_one_place_to_the_left(dtype, wide):
    logits = torch.arange(2 * 3 * 4).reshape(2, 3, 4).to(dtype)
    found = chunk_logits(logits, torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert found.dtype == wide
    assert torch.equal(found, torch.stack([logits[0, 0], logits[1, 1]]).to(wide))
