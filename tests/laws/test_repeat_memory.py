"""The memory of a repeat with second moments: two of its sums however many groups there are, as announced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import repeat_bytes, repeat_passes
from ffnscope.analyze.repeats import repeat_scores
from ffnscope.ffn.sites import find_sites
from reference import text
from tiny import tiny

torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

model = tiny("llama", num_hidden_layers={layers}, intermediate_size={d_ff})
sites = find_sites(model)
metrics = {{"rayleigh_quotient": {{}}, "pairwise_redundancy_gaussian": {{}}}}
repeat_scores(Question(model, sites[:1], metrics), text({groups}), groups={groups})
before = peak()
asked = Question(model, sites, metrics)
found = repeat_scores(asked, text({groups}), groups={groups})
assert len(found.without) == {groups}
print(peak() - before, repeat_bytes(sites, repeat_passes(metrics, asked.rule, {groups}), 0, {groups}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("groups", [2, 5])
def test_the_peak_of_a_repeat_is_what_was_announced(groups):
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), layers=24, d_ff=1536, groups=groups)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    measured, announced = (int(n) for n in done.stdout.split()[-2:])
    assert announced > 2 * 24 * 8 * 1536**2
    assert 0.8 * announced < measured < 1.2 * announced, f"{measured / 2**20:.0f} of {announced / 2**20:.0f} MiB"
