"""examples/heal_lora.py on a tiny pruned checkpoint: a few steps train it, and everything says that it is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ffnscope
from checkpoints import make_checkpoint
from scripts import load_script
from tiny import logits

SCRIPT = Path(__file__).parents[3] / "examples" / "heal_lora.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # what peft and the Trainer warn about


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


@pytest.fixture(params=["local", "global"])
def pruned(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of one width, and one of different widths with our modeling file."""
    dense = make_checkpoint(tmp_path / "dense", "llama")
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(dense), device="cpu"))
    sites = ffnscope.find_sites(loaded.model)
    plan = ffnscope.build_plan(ffnscope.score(loaded.model, sites, "random"), 0.51, request.param)
    assert len(set(plan.widths.values())) == (1 if request.param == "local" else 2)
    ffnscope.save_model(ffnscope.prune_(loaded.model, plan), loaded.tokenizer, tmp_path / "pruned", plan=plan)
    return tmp_path / "pruned"


@pytest.mark.parametrize("full", [False, True])
def test_it_trains_and_says_so(script: Any, pruned: Path, texts: Path, full: bool, capsys: Any, tmp_path: Path) -> None:
    text = ["--text", texts / "train.txt", "--held-out-text", texts / "test.txt", "--length", 32]
    sizes = ["--windows", 16, "--held-out-windows", 4, "--steps", 8, "--batch-size", 4, "--learning-rate", 1e-2]
    options = [*text, *sizes, "--rank", 4, "--device", "cpu", *(["--full"] if full else [])]
    script.main([str(one) for one in (pruned, tmp_path / "healed", *options)])
    found = re.search(r"pruned ([\d.]+), pruned, healed \(trained\) ([\d.]+)", capsys.readouterr().out)
    assert found and float(found[2]) < 0.95 * float(found[1])
    old, new = (ffnscope.load_model(ffnscope.ModelSource(str(f), device="cpu")) for f in (pruned, tmp_path / "healed"))
    assert [s.d_ff for s in ffnscope.find_sites(old.model)] == [s.d_ff for s in ffnscope.find_sites(new.model)]
    assert not torch.allclose(logits(old.model), logits(new.model), atol=1e-2)
    windows = ffnscope.load_windows(
        ffnscope.TextSource(str(texts / "test.txt"), split=None), new.tokenizer, n=4, length=32
    )
    assert ffnscope.perplexity(new.model, windows).value == pytest.approx(float(found[2]), rel=1e-3)
    card = (tmp_path / "healed" / "README.md").read_text()
    kind = "full fine-tuning" if full else "LoRA of rank 4, merged"
    assert "## Trained" in card and f"| kind | {kind} |" in card and "| tokens | 1,024 |" in card
    assert "| pruned, healed (trained) | perplexity |" in card
    plan = ffnscope.read_plan(tmp_path / "healed" / "ffnscope_plan.json")
    assert plan.provenance["trained"]["steps"] == 8


def test_an_output_is_not_replaced(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="already exists"):
        script.main(["/no/model", str(tmp_path)])
