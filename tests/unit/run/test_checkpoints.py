from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.errors import ConfigError, NotAvailableError
from ffnscope.run import checkpoints, config_from_dict
from runs import quiet_run, small_run
from tiny import logits


def config(checkpoint: Path, texts: Path, out: Path, **output: Any) -> Any:
    changes = {"pruning": {"allocator": "global"}, "output": {"checkpoints": True, **output}}
    return config_from_dict(small_run(checkpoint, texts, out, **changes))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_every_plan_is_saved(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = config(checkpoint, texts, tmp_path / "run", max_shard_size="30KB")
    result = quiet_run(asked)
    folder = result.folder / "checkpoints"
    assert {p.name for p in folder.iterdir()} == set(result.plans)
    dense = ffnscope.load_model(str(checkpoint)).model
    for label, plan in result.plans.items():
        pruned = ffnscope.load_model(str(folder / label)).model
        with ffnscope.masked(dense, plan):
            assert torch.allclose(logits(pruned), logits(dense), atol=1e-4)
        assert (folder / label / "model.safetensors.index.json").exists()
        card = (folder / label / "README.md").read_text()
        assert "| dense | perplexity |" in card and f"| {label} | kl_to_dense |" in card
        assert f"| calibration hash | {plan.provenance['calibration']['hash']} |" in card
        assert f"| made from | {checkpoint.name} |" in card
    # again: nothing is made twice; a lost file brings only its own checkpoint back
    label, *others = result.plans
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    quiet_run(asked)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == times
    (folder / label / "config.json").unlink()
    quiet_run(asked)
    assert (folder / label / "config.json").exists()
    assert all(p.stat().st_mtime_ns == times[p] for other in others for p in (folder / other).rglob("*"))


def test_a_model_that_is_offloaded(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    wanted = quiet_run(config(checkpoint, texts, tmp_path / "resident"))
    asked = config(checkpoint, texts, tmp_path / "offloaded")
    places: Any = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": str(tmp_path / "weights")}
    asked = asked.model_copy(update={"model": asked.model.model_copy(update=places)})
    found = quiet_run(asked)
    quiet_run(asked)  # finished, not stopped at the checkpoints
    for label in wanted.plans:
        one, other = (tensors_of(result.folder / "checkpoints" / label) for result in (wanted, found))
        assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())


def test_an_offloaded_model_as_gguf_is_loaded_where_it_was(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[ffnscope.ModelSource] = []
    load = ffnscope.load_model
    monkeypatch.setattr(checkpoints, "load_model", lambda source: [read.append(source), load(source)][1])
    output = {"format": "gguf", "pad_to_widest": True}
    wanted = quiet_run(config(checkpoint, texts, tmp_path / "resident", **output))
    asked = config(checkpoint, texts, tmp_path / "offloaded", **output)
    places: Any = {"device_map": "auto", "max_memory": {"cpu": "40KB"}}
    found = quiet_run(asked.model_copy(update={"model": asked.model.model_copy(update=places)}))
    assert {(one.device_map, one.device) for one in read} == {(None, "cpu"), ("auto", "cpu")}
    for label in wanted.plans:
        one, other = ((result.folder / "checkpoints" / f"{label}.gguf").read_bytes() for result in (wanted, found))
        assert one == other


def test_as_gguf(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    result = quiet_run(config(checkpoint, texts, tmp_path / "run", format="gguf", pad_to_widest=True))
    for label, plan in result.plans.items():
        place = {"gguf_file": f"{label}.gguf", "quantization_config": GgufConfig(dequantize=True)}
        again = AutoModelForCausalLM.from_pretrained(result.folder / "checkpoints", **place)
        assert again.config.intermediate_size == max(plan.widths.values())


def test_an_unfinished_folder_is_swept(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = config(checkpoint, texts, tmp_path / "run")
    result = quiet_run(asked)
    left = result.folder / "checkpoints" / f".random-0.5.{'0' * 32}.tmp"
    left.mkdir()
    (left / "model.safetensors").touch()
    quiet_run(asked)
    assert not left.exists()


def test_a_format_that_does_not_fit_stops_the_run_at_once(texts: Path, tmp_path: Path) -> None:
    gpt2 = make_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(NotAvailableError, match=r"'decilm' is for Llama.* is a GPT2LMHeadModel"):
        quiet_run(config(gpt2, texts, tmp_path / "run", format="decilm"))
    assert not (tmp_path / "run" / "statistics.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": {"enabled": False}, "output": {"checkpoints": True}}, "output.checkpoints: would save nothing"),
        ({"output": {"format": "gguf"}}, "output.format: would do nothing without 'checkpoints: true'"),
        ({"output": {"pad_to_widest": True}}, "output.pad_to_widest: would do nothing without"),
        ({"output": {"checkpoints": True, "max_shard_size": "5 apples"}}, "output.max_shard_size: "),
        (
            {"output": {"checkpoints": True, "format": "gguf", "max_shard_size": "1GB"}},
            "output.max_shard_size: would do nothing: 'format: gguf' writes one file",
        ),
        ({"output": {"checkpoints": True, "format": "gguff"}}, "output.format: "),
    ],
)
def test_refused(checkpoint: Path, texts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(small_run(checkpoint, texts, tmp_path / "run", **changes))
    assert message in str(error.value)
