"""The whole comparison on a tiny checkpoint; no timing is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ffnscope
from checkpoints import make_checkpoint, small_tokenizer
from ffnscope.errors import ArtifactError, DeviceError, UsageError
from ffnscope.evaluate import throughput
from ffnscope.evaluate.bench import bench
from ffnscope.evaluate.costs import Work
from ffnscope.evaluate.peak import Task, measurable, peak_memory
from ffnscope.evaluate.speed import BenchOptions
from ffnscope.ffn.load import ModelSource, resolve_device
from ffnscope.io import write_plan
from ffnscope.report.speed import speed_markdown
from ffnscope.types import PruningPlan
from tiny_moe import N_EXPERTS, TOP_K, tiny_moe

CPU = resolve_device("cpu")
FAST = BenchOptions(Work(1, 8, 2), repeats=2, warmup=0, peak_memory=False)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "READ_BYTES", (2**12, 2**13))
    monkeypatch.setattr(throughput, "MATRIX", {"cpu": 16})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, ``dense``, and the same pruned by half with its plan inside, ``pruned``."""
    folder = tmp_path_factory.mktemp("bench")
    loaded = ffnscope.load_model(str(make_checkpoint(folder / "dense")))
    plan = ffnscope.build_plan(ffnscope.score(loaded.model, ffnscope.find_sites(loaded.model), "random"), 0.5)
    ffnscope.save_model(ffnscope.prune_(loaded.model, plan), loaded.tokenizer, folder / "pruned", plan=plan)
    write_plan(folder / "plan.json", plan)
    return folder


@pytest.fixture(scope="module")
def plan(folder: Path) -> PruningPlan:
    return ffnscope.read_plan(folder / "plan.json")


def cpu(path: Path) -> ModelSource:
    return ModelSource(str(path), device="cpu")


def test_two_checkpoints(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = bench(cpu(folder / "dense"), str(folder / "pruned"), options=FAST, on_step=lambda *s: seen.append(s))
    assert seen == [(1, 2), (2, 2)]
    assert result.removed.found == result.removed.planned == result.removed.dense // 2
    assert result.removed.share == 0.5
    one, other = result.dense.costs, result.pruned.costs
    assert result.prefill.ideal == one.prefill_flops / other.prefill_flops > 1
    assert result.decode.ideal == one.read_bytes / other.read_bytes > result.decode_with_cache.ideal > 1
    assert result.decode.share == result.decode.measured.median / result.decode.ideal
    size = [(folder / name / "model.safetensors").stat().st_size for name in ("dense", "pruned")]
    assert [result.dense.file_bytes, result.pruned.file_bytes] == size
    assert result.dense.weights != result.pruned.weights
    assert result.dense.peak is None
    assert (result.setting["device"], result.setting["dtype"]) == ("cpu", "float32")
    found = result.to_dict()
    json.dumps(found, allow_nan=False)
    assert found["options"]["work"] == {"batch_size": 1, "prompt_length": 8, "new_tokens": 2}
    assert found["models"]["pruned"]["parameters"] == other.parameters
    assert found["speed_up"]["decode"]["ideal"] == result.decode.ideal
    assert len(found["models"]["dense"]["decode_seconds"]["samples"]) == 2


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model = tiny_moe("qwen2_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    plan = ffnscope.build_plan(ffnscope.score(model, ffnscope.find_sites(model), "random"), 0.5)
    ffnscope.save_model(ffnscope.prune_(model, plan), tokenizer, tmp_path / "pruned", plan=plan)
    result = bench(cpu(tmp_path / "dense"), str(tmp_path / "pruned"), options=FAST)
    assert result.removed.found == result.removed.planned == result.removed.dense // 2
    assert result.prefill.ideal > 1 and result.decode.ideal > 1
    used = result.to_dict()["models"]["pruned"]["experts"]
    assert used == {"total": N_EXPERTS, "per_token": TOP_K, "per_step": TOP_K}
    assert "a token is counted with 2 of 4 experts" in speed_markdown(result)


def test_one_model_and_a_plan(folder: Path, plan: PruningPlan) -> None:
    saved = bench(cpu(folder / "dense"), str(folder / "pruned"), plan=plan, options=FAST)
    sliced = bench(cpu(folder / "dense"), plan=plan, options=FAST)
    assert sliced.pruned.costs == saved.pruned.costs
    assert sliced.pruned.weights == saved.pruned.weights
    assert sliced.removed == saved.removed
    assert sliced.pruned.file_bytes is None
    assert sliced.pruned.name == f"{folder / 'dense'}, sliced"


def test_a_model_against_itself(folder: Path) -> None:
    result = bench(cpu(folder / "dense"), str(folder / "dense"), options=FAST)
    assert result.removed.found == 0 and result.removed.planned is None
    assert result.prefill.ideal == result.decode.ideal == 1


def test_refusals(folder: Path, tmp_path: Path, plan: PruningPlan) -> None:
    dense = cpu(folder / "dense")
    with pytest.raises(UsageError, match="give a second model"):
        bench(dense, options=FAST)
    other = make_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UsageError, match=r"model_type is 'llama' in .*dense and 'gpt2' in"):
        bench(dense, str(other), options=FAST)
    half = ModelSource(str(folder / "pruned"), device="cpu", dtype="bfloat16")
    with pytest.raises(UsageError, match=r"dtype is 'float32' in .* and 'bfloat16' in .*same --dtype"):
        bench(dense, half, options=FAST)
    with pytest.raises(UsageError, match="Give the dense model first"):
        bench(cpu(folder / "pruned"), str(folder / "dense"), options=FAST)
    with pytest.raises(UsageError, match="do not fit into LlamaForCausalLM, which has 128 positions"):
        bench(dense, plan=plan, options=BenchOptions(Work(1, 127, 2), repeats=2, peak_memory=False))


def test_a_damaged_plan_beside_the_model(folder: Path, tmp_path: Path) -> None:
    copy = make_checkpoint(tmp_path / "copy")
    (copy / "ffnscope_plan.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"ffnscope_plan.json cannot be read as JSON"):
        bench(cpu(folder / "dense"), str(copy), options=FAST)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"repeats": 1}, "repeats must be at least 2, or there is no spread; got 1"),
        ({"warmup": -1}, "warmup must be at least 0 rounds; got -1"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_options(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        BenchOptions(**options)


@pytest.mark.skipif(not measurable(CPU), reason="the counter of peak memory cannot be set back")
def test_peak_memory_grows_with_the_work(folder: Path, plan: PruningPlan) -> None:
    small, large = (peak_memory(Task(cpu(folder / "dense"), plan, Work(batch, 100, 1), 1, 0)) for batch in (1, 1024))
    assert large.total > small.total > small.libraries > 0
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers and heads of width 8
    assert large.model - small.model > 1023 * 100 * per_token


@pytest.mark.skipif(not measurable(CPU), reason="the counter of peak memory cannot be set back")
def test_a_failed_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"peak memory of .*none failed: .*none does not exist.*--no-memory"):
        peak_memory(Task(cpu(tmp_path / "none"), None, Work(1, 8, 1), 1, 0))
