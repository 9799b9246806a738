"""The memory of a reconstruction that is written block by block does not grow with the number of blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, warnings
from pathlib import Path
import torch
import ffnscope
from ffnscope.calibrate.windows import contiguous_windows
from transformers import AutoConfig, AutoModelForCausalLM

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": layers}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
config = AutoConfig.for_model("llama", **sizes, **heads)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense", max_shard_size="1MB")

from checkpoints import small_tokenizer

small_tokenizer().save_pretrained(folder / "dense")
source = ffnscope.ModelSource(str(folder / "dense"), device="cpu", dtype="float32", stream="disk")
loaded = ffnscope.load_model(source)
model = loaded.model
windows = contiguous_windows(torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0)), "random")
sites = ffnscope.find_sites(model)
random = torch.Generator().manual_seed(0)
values = {site: torch.rand(site.d_ff, generator=random, dtype=torch.float64) for site in sites}
plan = ffnscope.build_plan(ffnscope.Scores("random", values, {}), 0.5)

def now(counter):
    rows = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(rows[counter].split()[0]) * 1024

seen = []
note = lambda done, total: seen.append((now("RssAnon"), now("VmHWM")))
ffnscope.reconstruct_to(model, None, ffnscope.Destination(folder / "half"), windows, plan, on_block=note)
block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
print(json.dumps({"seen": seen, "block": block}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    n_blocks, first = 14, 4
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(n_blocks)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tests,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    anonymous, peaks = zip(*found["seen"][first:], strict=True)
    weights = found["block"] * (n_blocks - first)
    # whatever is kept of every block would grow by the weights of each, or by a part of them
    assert max(anonymous) - anonymous[0] < weights / 8
    assert peaks[-1] - peaks[0] < weights / 4
