"""The memory of a pass with second moments: what was announced, and temporaries of one site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
from ffnscope.calibrate.collect import PassOptions, calibrate, required_statistics, statistics_bytes
from ffnscope.ffn.sites import find_sites
from reference import text
from tiny import tiny

torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

model = tiny("llama", num_hidden_layers={layers}, intermediate_size={d_ff})
sites = find_sites(model)
options = PassOptions(batch_size=2)
calibrate(model, text(4), ["wanda", "scar_loss_proxy"], sites=sites, options=options)
before = peak()
found = calibrate(model, text(4), {metrics!r}, sites=sites, options=options)
print(peak() - before, statistics_bytes(sites, required_statistics({metrics!r})))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "metrics", [["average_redundancy"], ["average_redundancy", "sparsegpt", "mutual_information_gaussian"]], ids=str
)
def test_the_peak_of_a_pass_is_what_was_announced(metrics):
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), layers=32, d_ff=1536, metrics=metrics)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    measured, announced = (int(n) for n in done.stdout.split()[-2:])
    assert announced > 32 * 8 * 1536**2
    assert 0.9 * announced < measured < 1.2 * announced, f"{measured / 2**20:.0f} of {announced / 2**20:.0f} MiB"
