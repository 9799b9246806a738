"""Pruned checkpoints of one width and of different widths give lm-eval the log-likelihoods that they give us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints import make_checkpoint
from ffnscope.apply.export import prune_, save_model
from ffnscope.ffn.load import load_model
from ffnscope.types import PruningPlan

MakePlan = Callable[..., PruningPlan]
CONTEXT, CONTINUATION = "We the people", " of the United States"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("allocator", "code"), [("local", False), ("global", True)])
def test_log_likelihoods(allocator: str, code: bool, random_plan: MakePlan, tmp_path: Path) -> None:
    huggingface: Any = pytest.importorskip("lm_eval.models.huggingface")
    loaded = load_model(str(make_checkpoint(tmp_path / "dense")))
    model = prune_(loaded.model, random_plan(loaded.model, 0.51, allocator=allocator))
    save_model(model, loaded.tokenizer, tmp_path / "out")
    theirs = huggingface.HFLM(
        pretrained=str(tmp_path / "out"), trust_remote_code=code, device="cpu", dtype="float32", batch_size=1
    )
    ((found, _),) = theirs.loglikelihood([SimpleNamespace(args=(CONTEXT, CONTINUATION))])
    start = len(loaded.tokenizer(CONTEXT).input_ids)
    ids = torch.tensor([loaded.tokenizer(CONTEXT + CONTINUATION).input_ids])
    with torch.no_grad():
        logits: Any = model(input_ids=ids).logits.log_softmax(-1)
    wanted = sum(float(logits[0, i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
    assert found == pytest.approx(wanted, rel=1e-4)
