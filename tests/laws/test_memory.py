"""The memory of second moments, in a pass and in a repeat: what was announced, and temporaries of one site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import sys
sys.path.insert(0, {tests!r})
import torch
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import repeat_bytes, repeat_passes
from ffnscope.analyze.repeats import repeat_scores
from ffnscope.calibrate.collect import PassOptions, calibrate, required_statistics
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.ffn.sites import find_sites
from reference import text
from tiny import tiny

torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

model = tiny("llama", num_hidden_layers={layers}, intermediate_size={d_ff})
sites = find_sites(model)
"""
PASS = """
options = PassOptions(batch_size=2)
calibrate(model, text(4), ["wanda", "scar_loss_proxy"], sites=sites, options=options)
before = peak()
found = calibrate(model, text(4), {metrics!r}, sites=sites, options=options)
print(peak() - before, statistics_bytes(sites, required_statistics({metrics!r})))
"""
REPEAT = """
metrics = {{"rayleigh_quotient": {{}}, "pairwise_redundancy_gaussian": {{}}}}
repeat_scores(Question(model, sites[:1], metrics), text({groups}), groups={groups})
before = peak()
asked = Question(model, sites, metrics)
found = repeat_scores(asked, text({groups}), groups={groups})
assert len(found.without) == {groups}
print(peak() - before, repeat_bytes(sites, repeat_passes(metrics, asked.rule, {groups}), 0, {groups}))
"""


def measured_and_announced(program, **values):
    """Bytes that a program printed, run in a process of its own."""
    program = (SETUP + program).format(tests=str(Path(__file__).parents[1]), d_ff=1536, **values)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return (int(n) for n in done.stdout.split()[-2:])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "metrics", [["average_redundancy"], ["average_redundancy", "sparsegpt", "mutual_information_gaussian"]], ids=str
)
def test_the_peak_of_a_pass_is_what_was_announced(metrics):
    measured, announced = measured_and_announced(PASS, layers=32, metrics=metrics)
    assert announced > 32 * 8 * 1536**2
    assert 0.9 * announced < measured < 1.2 * announced, f"{measured / 2**20:.0f} of {announced / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("groups", [2, 5])
def test_the_peak_of_a_repeat_is_two_sums_however_many_groups(groups):
    measured, announced = measured_and_announced(REPEAT, layers=24, groups=groups)
    assert announced > 2 * 24 * 8 * 1536**2
    assert 0.8 * announced < measured < 1.2 * announced, f"{measured / 2**20:.0f} of {announced / 2**20:.0f} MiB"
