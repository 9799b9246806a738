"""The comparison of a dense and a pruned model on CUDA: what is measured, not how fast it is."""

from __future__ import annotations

import pytest
import torch

import ffnscope
from checkpoints import make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_bench(tmp_path):
    source = ffnscope.ModelSource(str(make_checkpoint(tmp_path / "m")), device="cuda", dtype="bfloat16")
    loaded = ffnscope.load_model(source)
    plan = ffnscope.build_plan(ffnscope.score(loaded.model, ffnscope.find_sites(loaded.model), "random"), 0.5)
    options = ffnscope.BenchOptions(ffnscope.Work(4, 64, 8), repeats=2, warmup=1)
    result = ffnscope.bench(source, plan=plan, options=options)
    assert result.removed.found == result.removed.planned
    assert (result.setting["device"], result.setting["dtype"]) == ("cuda:0", "bfloat16")
    for model in (result.dense, result.pruned):
        assert model.peak.libraries == 0
        assert model.peak.total > model.costs.parameter_bytes + model.cache_bytes[1]
    assert result.matmul.median > result.bandwidth.median > 0
