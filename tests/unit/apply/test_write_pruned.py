"""A checkpoint written block by block is the one that cutting and saving the whole model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ffnscope
from ffnscope.apply.block_writer import BlockWriter
from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.reconstruction import Reconstruction, reconstruct_
from ffnscope.apply.sequential import SequentialOptions, reconstruct_sequential
from ffnscope.apply.write_pruned import Destination, reconstruct_to, write_pruned
from ffnscope.calibrate.collect import weights_hash
from ffnscope.errors import ArtifactError, ModelError, NotAvailableError
from ffnscope.ffn.load import ModelSource, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.streamed import is_streamed
from ffnscope.types import PruningPlan
from reference import text
from streams import streamed
from tiny import logits, tiny
from tiny_moe import tiny_moe


def a_plan(model: Any, sparsity: float = 0.5, allocator: str = "local") -> PruningPlan:
    random = torch.Generator().manual_seed(0)
    values = {site: torch.rand(site.d_ff, generator=random, dtype=torch.float64) for site in find_sites(model)}
    return ffnscope.build_plan(ffnscope.Scores("random", values, {}), sparsity, allocator)


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def check_same(found: Path, wanted: Path) -> None:
    one, other = tensors(found), tensors(wanted)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert config(found) == config(wanted)
    assert {p.name for p in wanted.iterdir() if p.suffix != ".safetensors"} <= {p.name for p in found.iterdir()}
    assert sorted(p.name for p in found.iterdir() if "part" in p.name or "written" in p.name) == []


MODELS: dict[str, Any] = {
    name: (lambda name=name: tiny(name)) for name in ("llama", "gpt2", "phi3", "gemma", "opt", "llama_bias", "bert")
} | {name: (lambda name=name: tiny_moe(name)) for name in ("mixtral", "qwen2_moe", "olmoe")}


@pytest.mark.filterwarnings("ignore:experts of one layer", "ignore:one config field")
@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    plan = a_plan(model)
    twin = streamed(model)
    before = weights_hash(twin)
    n_parameters, _ = write_pruned(twin, None, Destination(tmp_path / "found"), plan)
    assert weights_hash(twin) == before
    assert all(p.device.type == "meta" for p in twin.parameters())
    cut = prune_(model, plan)
    save_model(cut, None, tmp_path / "wanted", plan=plan)
    check_same(tmp_path / "found", tmp_path / "wanted")
    assert n_parameters == sum(p.numel() for p in cut.parameters())


@pytest.mark.parametrize("pad", [False, True])
def test_different_widths(pad: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    plan = a_plan(model, 0.4, "global")
    write_pruned(streamed(model), None, Destination(tmp_path / "found", pad_to_widest=pad), plan)
    save_model(prune_(model, plan, pad_to_widest=pad), None, tmp_path / "wanted", plan=plan)
    check_same(tmp_path / "found", tmp_path / "wanted")
    assert (tmp_path / "found" / "README.md").read_text() == (tmp_path / "wanted" / "README.md").read_text().replace(
        "wanted", "found"
    )


def test_plain_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    plan = a_plan(model)
    write_pruned(streamed(model), None, Destination(tmp_path / "found", max_shard_size="5KB"), plan)
    assert len(list((tmp_path / "found").glob("*.safetensors"))) > 4
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "found").eval()
    assert torch.equal(logits(found), logits(prune_(model, plan)))


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_reconstruction_block_by_block(name: str, tmp_path: Path) -> None:
    model = tiny_moe(name) if name == "mixtral" else tiny(name, dtype=torch.float64)
    plan, options = a_plan(model), SequentialOptions(batch_size=4)
    found = reconstruct_sequential(model, text(16), plan, options=options)
    told = reconstruct_to(streamed(model), None, Destination(tmp_path / "found"), text(16), plan, options)
    assert told.provenance["reconstruction"].keys() == found.facts.keys()
    save_model(reconstruct_(model, found), None, tmp_path / "wanted", plan=found.told_plan)
    one, other = tensors(tmp_path / "found"), tensors(tmp_path / "wanted")
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert one[key].shape == value.shape
        assert float((one[key] - value).abs().max()) <= 1e-4 * float(value.abs().max())


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_streams_wait_elsewhere(place: Any, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=3)
    plan = a_plan(model)
    wanted = reconstruct_sequential(model, text(16), plan)
    found = reconstruct_sequential(streamed(model, place, tmp_path), text(16), plan)
    for site, down in wanted.down.items():
        assert torch.allclose(found.down[site], down, rtol=1e-9, atol=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_one_block_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(tiny("llama", num_hidden_layers=4))
    most: list[int] = []
    save = BlockWriter._save

    def look(self: Any, names: Any) -> Any:
        layers = self.skeleton.model.layers
        most.append(sum(any(p.device.type != "meta" for p in layer.parameters()) for layer in layers))
        return save(self, names)

    monkeypatch.setattr(BlockWriter, "_save", look)
    write_pruned(model, None, Destination(tmp_path / "out"), a_plan(model))
    assert most == [1, 1, 1, 1, 0]


def test_nothing_stays_after_a_failure_and_nothing_is_replaced(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = a_plan(model)
    site = next(iter(plan.kept))
    pruned = Reconstruction(plan, {}, {site: torch.zeros(site.d_model)})
    for one, why in ((model, "cannot be given one"), (streamed(model), "offloaded and have no bias")):
        with pytest.raises(NotAvailableError, match=why):
            write_pruned(one, None, Destination(tmp_path / "out"), pruned)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="already exists"):
        write_pruned(streamed(model), None, Destination(tmp_path / "out"), plan)


def test_from_files_to_files(tmp_path: Path) -> None:
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    small_tokenizer(tmp_path / "dense")
    loaded = load_model(ModelSource(str(tmp_path / "dense"), device="cpu", stream="disk", offload_folder=str(tmp_path)))
    assert is_streamed(loaded.model)
    assert all(p.device.type == "meta" for p in loaded.model.parameters())
    stats = ffnscope.calibrate(loaded.model, text(8), ["scar_loss_proxy"])
    plan = ffnscope.build_plan(ffnscope.score(loaded.model, stats, "scar_loss_proxy"), 0.5)
    rows = ffnscope.compare_plans(loaded.model, {"half": plan}, text(4), batch_size=2)
    write_pruned(loaded.model, loaded.tokenizer, Destination(tmp_path / "out"), plan)
    again = load_model(ModelSource(str(tmp_path / "out"), device="cpu", stream="cpu"))
    value = ffnscope.perplexity(again.model, text(4), batch_size=2).value
    assert value == pytest.approx(rows[1].results[0].value, rel=1e-5)
    resident = ffnscope.calibrate(dense, text(8), ["scar_loss_proxy"])
    wanted = ffnscope.build_plan(ffnscope.score(dense, resident, "scar_loss_proxy"), 0.5)
    assert all(torch.equal(wanted.kept[site], index) for site, index in plan.kept.items())


def small_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(64)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="t2").save_pretrained(folder)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_cannot_be_read_is_not_called_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    tiny("llama").save_pretrained(tmp_path / "dense")
    small_tokenizer(tmp_path / "dense")
    model = load_model(ModelSource(str(tmp_path / "dense"), device="cpu", stream="cpu")).model
    plan, shard = a_plan(model), tmp_path / "dense" / "model.safetensors"
    real = BlockWriter._save

    def damaged(self: Any, names: Any) -> Any:
        shard.write_bytes(shard.read_bytes()[:-7]) if damage == "cut" else shard.unlink()
        monkeypatch.setattr(BlockWriter, "_save", real)
        return real(self, names)

    monkeypatch.setattr(BlockWriter, "_save", damaged)
    with pytest.raises(ModelError, match=rf"the weight \S+ of {shard} cannot be read: .*Put an intact copy there"):
        write_pruned(model, None, Destination(tmp_path / "out"), plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_resident_model_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    model: nn.Module = tiny(name)
    before, plan = weights_hash(model), a_plan(model)
    write_pruned(model, None, Destination(tmp_path / "found"), plan)
    assert weights_hash(model) == before
    save_model(prune_(model, plan), None, tmp_path / "wanted", plan=plan)
    check_same(tmp_path / "found", tmp_path / "wanted")
