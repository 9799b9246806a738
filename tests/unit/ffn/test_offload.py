from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults import small_files
from ffnscope.errors import ArtifactError, ModelError, UsageError
from ffnscope.ffn.offload import (
    check_values,
    edited,
    is_offloaded,
    materialised,
    named_values,
    placement,
    saving,
    set_requires_grad,
    stored,
)
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from offload import KINDS, in_checkpoint, in_memory, on_disk
from tiny import logits, tiny

Offloaded = Callable[..., Any]


@pytest.fixture(params=KINDS)
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Offloaded:
    return lambda arch="llama", **changes: KINDS[request.param](arch, tmp_path, **changes)


def files(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def last(model: Any) -> Any:
    """The FFN of the last layer, which is offloaded in every kind."""
    return model.model.layers[-1].mlp


def on_meta(model: Any) -> list[str]:
    return [name for name, value in model.named_parameters() if is_offloaded(value)]


@pytest.mark.parametrize("arch", ["llama_bias", "gpt2", "phi3", "opt"])
def test_weights_are_those_of_the_resident_model(offloaded: Offloaded, arch: str) -> None:
    model, resident = offloaded(arch), tiny(arch)
    empty = on_meta(model)
    for site in find_sites(resident):
        with materialised(model, site):
            found, wanted = weights_of(model, site), weights_of(resident, site)
            for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
                a, b = getattr(found, name), getattr(wanted, name)
                assert (a is None and b is None) or torch.equal(a, b)
    assert on_meta(model) == empty
    assert torch.equal(logits(model), logits(resident))


def test_named_values(offloaded: Offloaded) -> None:
    model, resident = offloaded("llama_bias", tie_word_embeddings=True), tiny("llama_bias", tie_word_embeddings=True)
    found, wanted = dict(named_values(model)), resident.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


class TestReading:
    def test_a_value_outlives_the_block(self, offloaded: Offloaded) -> None:
        model = offloaded()
        site = find_sites(model)[-1]
        with materialised(model, site):
            up = weights_of(model, site).up
        assert is_offloaded(last(model).up_proj.weight)
        assert torch.equal(up, last(tiny("llama")).up_proj.weight)

    def test_outside_the_block(self, offloaded: Offloaded) -> None:
        model = offloaded()
        site = find_sites(model)[-1]
        with pytest.raises(ModelError, match=r"mlp.*are offloaded .*Work inside `with materialised\(model, site\):`"):
            weights_of(model, site)

    def test_several_sites_and_nesting(self, offloaded: Offloaded) -> None:
        model = offloaded()
        sites = find_sites(model)
        with materialised(model, *sites):
            with materialised(model, sites[-1]):
                assert not is_offloaded(last(model).up_proj.weight)
            assert not is_offloaded(last(model).up_proj.weight)
        assert is_offloaded(last(model).up_proj.weight)

    def test_flags_stay(self, offloaded: Offloaded) -> None:
        model = offloaded()
        last(model).up_proj.weight.requires_grad_(False)
        with materialised(model, find_sites(model)[-1]):
            assert not last(model).up_proj.weight.requires_grad and last(model).down_proj.weight.requires_grad
        assert not last(model).up_proj.weight.requires_grad and last(model).down_proj.weight.requires_grad

    def test_in_inference_mode(self, offloaded: Offloaded) -> None:
        model = offloaded()
        site = find_sites(model)[-1]
        with torch.inference_mode(), materialised(model, site):
            pass
        logits(model)
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits.sum().backward()

    def test_a_resident_model_is_left_alone(self, llama: Any) -> None:
        before = [id(p) for p in llama.parameters()]
        with materialised(llama, *find_sites(llama), write=True):
            assert [id(p) for p in llama.parameters()] == before
        assert [id(p) for p in llama.parameters()] == before

    def test_precision_is_that_of_the_model(self, tmp_path: Path) -> None:
        model = in_checkpoint("llama", tmp_path, dtype=torch.float32)
        (name, weight), *_ = [(n, p) for n, p in model.named_parameters() if is_offloaded(p)]
        assert stored(model, model.get_submodule(name.rpartition(".")[0]), "weight").value.dtype == weight.dtype


class TestWriting:
    def test_values(self, offloaded: Offloaded, tmp_path: Path) -> None:
        model, resident = offloaded(), tiny("llama")
        before = files(tmp_path)
        with torch.no_grad(), materialised(model, find_sites(model)[-1], write=True):
            last(model).up_proj.weight.mul_(2)
        with torch.no_grad():
            last(resident).up_proj.weight.mul_(2)
        assert torch.equal(logits(model), logits(resident))
        assert before.items() <= files(tmp_path).items(), "a file of the user was changed"

    def test_shapes(self, offloaded: Offloaded) -> None:
        model = offloaded()
        up = last(model).up_proj
        with materialised(model, find_sites(model)[-1], write=True):
            up.weight = nn.Parameter(up.weight[:7].detach().clone())
        assert up.weight.shape == (7, 32) and is_offloaded(up.weight)
        assert torch.equal(stored(model, up, "weight").value, last(tiny("llama")).up_proj.weight[:7])

    def test_nothing_is_kept_when_the_block_raises(self, offloaded: Offloaded) -> None:
        model = offloaded()
        site, up = find_sites(model)[-1], last(model).up_proj

        def fail() -> None:
            with torch.no_grad(), materialised(model, site, write=True):
                last(model).gate_proj.weight.zero_()
                up.weight = nn.Parameter(up.weight[:7].detach().clone())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert is_offloaded(up.weight) and torch.equal(logits(model), logits(tiny("llama")))

    def test_nothing_is_kept_when_a_file_cannot_be_written(self, tmp_path: Path) -> None:
        model = on_disk("llama", tmp_path)
        site = find_sites(model)[-1]

        def change() -> None:
            with torch.no_grad(), materialised(model, site, write=True):
                last(model).gate_proj.weight.zero_()

        with small_files(), pytest.raises(ArtifactError, match=r"cannot write .*safetensors"):
            change()
        assert torch.equal(logits(model), logits(tiny("llama")))

    def test_changed_files_are_removed_with_the_model(self, tmp_path: Path) -> None:
        model = on_disk("llama", tmp_path)
        before = files(tmp_path)
        with materialised(model, find_sites(model)[-1], write=True):
            pass
        assert len(files(tmp_path)) == len(before) + 3
        del model
        gc.collect()
        assert files(tmp_path) == before

    def test_within_a_mask(self, offloaded: Offloaded) -> None:
        model = offloaded()
        site = find_sites(model)[-1]
        with (
            edited(model, last(model).up_proj, "weight", torch.zeros_like),
            pytest.raises(UsageError, match="a masked model cannot be changed; leave the `masked` block first"),
            materialised(model, site, write=True),
        ):
            pass
        assert torch.equal(logits(model), logits(tiny("llama")))


class TestEditing:
    def test_the_forward_and_every_reader_see_it(self, offloaded: Offloaded) -> None:
        model, resident = offloaded(), tiny("llama")
        dense, up = logits(model), last(model).up_proj
        with torch.no_grad():
            last(resident).up_proj.weight.mul_(-2)
        with (
            edited(model, up, "weight", lambda value: value * 2),
            edited(model, up, "weight", torch.neg),
        ):
            assert torch.equal(logits(model), logits(resident))
            with materialised(model, find_sites(resident)[-1]):
                assert torch.equal(up.weight, last(resident).up_proj.weight)
        assert torch.equal(logits(model), dense)

    def test_after_an_exception(self, offloaded: Offloaded) -> None:
        model = offloaded()
        with pytest.raises(RuntimeError), edited(model, last(model).up_proj, "weight", torch.zeros_like):
            raise RuntimeError
        assert torch.equal(logits(model), logits(tiny("llama")))


class TestWithoutValues:
    def test_no_hook(self) -> None:
        model = tiny("llama").to("meta")
        message = r"model.layers.1.mlp.up_proj.weight is on the meta device and has no value: no accelerate hook keeps"
        with pytest.raises(ModelError, match=message):
            stored(model, last(model).up_proj, "weight")

    def test_check(self, offloaded: Offloaded, llama: Any) -> None:
        site = find_sites(llama)[-1]
        check_values(offloaded(), site)
        check_values(llama, site)
        with pytest.raises(ModelError, match="on the meta device and has no value"):
            check_values(llama.to("meta"), site)


def test_a_hook_that_places_whole_blocks(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(tiny("llama"), torch.device("cpu"), preload_module_classes=["LlamaMLP"])
    site = find_sites(model)[-1]
    assert not hasattr(last(model).up_proj, "_hf_hook")
    with torch.no_grad(), materialised(model, site, write=True):
        last(model).up_proj.weight.mul_(2)
    resident = tiny("llama")
    with torch.no_grad():
        last(resident).up_proj.weight.mul_(2)
    assert torch.equal(logits(model), logits(resident))


@pytest.mark.parametrize("tied", [False, True])
def test_saving(offloaded: Offloaded, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model, resident = offloaded("llama", tie_word_embeddings=tied), tiny("llama", tie_word_embeddings=tied)
    had_map = getattr(model, "hf_device_map", None)
    with saving(model) as arguments:
        model.save_pretrained(tmp_path / "a", **arguments)
    with saving(resident) as arguments:
        assert arguments == {}
        resident.save_pretrained(tmp_path / "b")
    assert getattr(model, "hf_device_map", None) == had_map
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again), logits(resident))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert abs(sizes[0] - sizes[1]) < 200, "tied weights are written once"


def test_placement(offloaded: Offloaded, llama: Any, tmp_path: Path) -> None:
    assert placement(llama) == "cpu"
    assert placement(in_memory("llama", tmp_path)) == "offloaded"
    assert "offloaded" in placement(offloaded())


def test_flags_of_emptied_parameters(offloaded: Offloaded) -> None:
    model = offloaded()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    up = last(model).up_proj
    set_requires_grad(up, "weight", flag=False)
    assert not up.weight.requires_grad
    set_requires_grad(up, "weight", flag=True)
    assert up.weight.requires_grad and is_offloaded(up.weight)
