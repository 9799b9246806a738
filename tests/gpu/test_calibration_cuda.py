"""The calibration pass and the metrics on CUDA give what the CPU gives."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.capture import capture
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from reference import calibrate_in_two, exact, padded, some_core
from tiny import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt_neox"])
def test_scores_agree_with_the_cpu(arch):
    model, before = exact(arch), exact(arch, seed=1)
    windows, core = padded([16, 5, 9, 16, 2]), some_core(find_sites(model))
    stats = calibrate_in_two(model, windows, core)
    expected = {n: score(model, stats, n, core=core, reference=before) for n in METRICS.names()}
    model.cuda()
    stats = calibrate_in_two(model, windows, core)
    assert {v.device.type for part in stats.values() for v in part.values.values()} == {"cpu"}
    for name, scores in expected.items():
        found = score(model, stats, name, core=core, reference=before)
        for site, value in scores.values.items():
            assert torch.allclose(found.values[site], value, rtol=1e-6, atol=1e-12), (name, site.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model, before = (tiny("llama", dtype=dtype, seed=seed).cuda() for seed in (0, 1))
    core = some_core(find_sites(model))
    stats = calibrate_in_two(model, padded([16, 5, 9]), core)
    for name in METRICS.names():
        score(model, stats, name, core=core, reference=before)


def test_capture(tmp_path):
    model = exact("llama")
    windows = padded([16, 5])
    expected = capture(model, windows, tmp_path / "cpu", gradients=True)
    found = capture(model.cuda(), windows, tmp_path / "cuda", gradients=True)
    for site in expected.sites:
        assert torch.allclose(found.h(site), expected.h(site), rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.g(site), expected.g(site), rtol=1e-9, atol=1e-12)
