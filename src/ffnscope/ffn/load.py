"""Load a causal LM and its tokenizer from the hub, a directory, a GGUF file, or a GGUF inside an installed package."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.errors import DeviceError, ModelError, UsageError
from ffnscope.ffn.checkpoint import (
    check_architecture,
    check_causal,
    check_folder,
    explain_pickle,
    find_commit,
    hub_bytes,
    no_conversion,
)
from ffnscope.ffn.checksums import check_files
from ffnscope.ffn.gguf import PACKAGE, cache_dir, converted, converted_bytes, find_gguf
from ffnscope.ffn.guard import check_config, check_model
from ffnscope.ffn.messages import explained, quiet_transformers
from ffnscope.ffn.narrowed import causal_lm
from ffnscope.ffn.streamed import PLACES, Place, offload_to, stream_

__all__ = [
    "DTYPES",
    "LoadedModel",
    "ModelSource",
    "cache_dir",
    "find_gguf",
    "load_model",
    "quiet_transformers",
    "read_token",
    "resolve_device",
    "resolve_dtype",
    "source_of",
    "stored_bytes",
]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEVICES = "auto, cpu, cuda, cuda:N or mps"
MEMORY = r"\d+(\.\d+)? ?([KMGT]i?B)?"
"""A limit of memory, such as 8GiB, 500MB, or a number of bytes."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load and how.

    Attributes:
        model_id: hub id, local directory, ``.gguf`` file, or ``package:DIST``: the GGUF inside an installed
            distribution.
        revision: commit, tag or branch on the hub.
        dtype: "auto" (what the checkpoint says) or a torch dtype by name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; ignored when ``device_map`` is set.
        device_map: passed to `transformers` (accelerate): "auto", or module path -> device, "cpu" or "disk".
        trust_remote_code: run code that comes with the checkpoint.
        model_kwargs: further arguments of the model's ``from_pretrained``.
        tokenizer_kwargs: further arguments of the tokenizer's ``from_pretrained``.
        max_memory: limit per device for ``device_map``: 0, 1, ... or "cpu" -> bytes, or text such as "8GiB".
        offload_folder: folder for weights on disk that have to be written there (safetensors are read where they are).
        cache_dir: folder of the hub's files; None = the hub client's own (HF_HOME).
        token: access token of the hub; None = HF_TOKEN, or the login that ``hf auth login`` stored.
        offline: use only files that are here already.
        allow_pickle: also load a checkpoint that is not safetensors (pytorch_model.bin, as ``weights_only``).
        stream: for a model that does not fit: all weights stay in the files, and calibration and evaluation read one
            decoder block at a time for all windows (see `ffnscope.ffn.streamed`). The value is where the hidden states
            of the windows wait meanwhile: "device" (that computes), "cpu", or "disk" (in ``offload_folder``).

    Raises:
        UsageError: options that contradict each other or would do nothing, a malformed limit of memory, an unknown
            place for hidden states, or ``ignore_mismatched_sizes``.
    """

    model_id: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_memory: Mapping[Any, str | int] | None = None
    offload_folder: str | None = None
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    allow_pickle: bool = False
    stream: Place | None = None

    def __post_init__(self) -> None:
        if self.device_map is None:
            for name in ("max_memory", "offload_folder"):
                if getattr(self, name) is not None and not (self.stream and name == "offload_folder"):
                    raise UsageError(f"{name} would do nothing without device_map; set device_map, for example 'auto'.")
        elif self.stream is not None:
            raise UsageError("stream leaves all weights in their files, so device_map would do nothing; leave it out.")
        if self.stream is not None and self.stream not in PLACES:
            raise UsageError(f"stream must be the place of hidden states, {', '.join(PLACES)}; got {self.stream!r}.")
        if "ignore_mismatched_sizes" in self.model_kwargs:
            raise UsageError(
                "ignore_mismatched_sizes would load weights of other shapes as random numbers; leave it out. FFNs of "
                "different widths that ffnscope saved load without it."
            )
        for place, limit in (self.max_memory or {}).items():
            if not re.fullmatch(MEMORY, str(limit)):
                raise UsageError(f"max_memory of {place!r} must be bytes or text such as '8GiB'; got {limit!r}.")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in eval mode, its tokenizer, the folder or id that it was loaded from, and the commit on the hub."""

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    origin: str
    revision: str | None = None

    @property
    def facts(self) -> dict[str, str | None]:
        """What identifies the checkpoint in records: what was asked for, and the commit that a hub model came from."""
        return {"model_id": self.source.model_id, "revision": self.revision}


def load_model(source: ModelSource | str) -> LoadedModel:
    """Load model and tokenizer.

    A GGUF is dequantised once (about 20 s for 135M parameters) and kept as safetensors in the user's cache folder
    (environment variable ``FFNSCOPE_CACHE`` moves it). Config, tokenizer and weights of a hub model come from one
    commit. Code that comes with a checkpoint, and pickle files, are refused unless the source allows them. A local
    checkpoint that ffnscope has written is compared with its checksums first.

    Raises:
        ModelError: missing, damaged, gated, quantised, adapter or pickle checkpoint, no network; the message names the
            cure.
        DeviceError: the device is not there, or too small.
        UsageError: no such device or dtype name, or a revision of a local model.
    """
    source = ModelSource(source) if isinstance(source, str) else source
    device = resolve_device(source.device) if source.device_map is None else None
    dtype = resolve_dtype(source.dtype)
    where = _resolve(source.model_id)
    if isinstance(where, Path) and source.revision is not None:
        raise UsageError(f"revision {source.revision!r} has no meaning for {where}, which is local. Leave it out.")
    origin = str(converted(where)) if isinstance(where, Path) and where.suffix == ".gguf" else str(where)
    with quiet_transformers(), explained(source.model_id, offline=source.offline), no_conversion():
        if isinstance(where, Path):
            check_files(Path(origin))
        commit = find_commit(origin, source.revision, _access(source)) if isinstance(where, str) else None
        model, tokenizer = _from_pretrained(origin, source, dtype, commit)
        check_model(model)
        if source.stream is not None:
            folder = None if source.offload_folder is None else Path(source.offload_folder)
            stream_(model, source.stream, device or torch.device("cpu"), folder)
        elif device is not None:
            model = model.to(device)
    _SOURCES[model] = source
    return LoadedModel(model.eval(), tokenizer, source, origin, commit)


_SOURCES: weakref.WeakKeyDictionary[nn.Module, ModelSource] = weakref.WeakKeyDictionary()


def source_of(model: nn.Module) -> ModelSource | None:
    """What a model was loaded from by `load_model`, or None."""
    return _SOURCES.get(model)


def stored_bytes(source: ModelSource) -> int | None:
    """Size of a checkpoint's safetensors, before they are read; None where that is not known.

    Of a GGUF it is that of the safetensors into which it is converted. Of a hub model the index is asked for, which is
    a small file; a model of one file has none, and is taken as unknown unless it is in the cache.
    """
    where = _resolve(source.model_id)
    if isinstance(where, Path):
        if where.suffix == ".gguf":
            return converted_bytes(where)
        sizes = [path.stat().st_size for path in where.glob("*.safetensors")] if where.is_dir() else []
        return sum(sizes) or None
    return hub_bytes(where, {**_access(source), "revision": source.revision})


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


def read_token(variable: str | None) -> str | None:
    """Access token of the hub from an environment variable; None = leave it to the hub client.

    Raises:
        ModelError: the variable is not set.
    """
    token = None if variable is None else os.environ.get(variable)
    if variable is not None and not token:
        raise ModelError(f"the environment variable {variable} (model.token_env) should hold a token, but is not set.")
    return token


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
        check_folder(path)
    elif path.suffix != ".gguf":
        raise ModelError(f"{path} is a file, but not a .gguf; model_id may be {_ACCEPTED}.")
    return path


def _access(source: ModelSource) -> dict[str, Any]:
    """Arguments with which every file of the hub is fetched."""
    return {"cache_dir": source.cache_dir, "token": source.token, "local_files_only": source.offline}


def _from_pretrained(
    origin: str, source: ModelSource, dtype: torch.dtype | str, commit: str | None
) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoTokenizer

    access = {**_access(source), "revision": commit or source.revision}
    remote = {"trust_remote_code": source.trust_remote_code}
    if not source.trust_remote_code:
        check_architecture(origin, source.model_id, access)
    config = AutoConfig.from_pretrained(origin, **access, **remote)
    check_config(config, source.model_id)
    check_causal(config, source.model_id)
    tokenizer = AutoTokenizer.from_pretrained(origin, **access, **remote, **source.tokenizer_kwargs)
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": None if source.allow_pickle else True}
    if source.device_map is not None:
        how["device_map"] = source.device_map
        how["offload_folder"] = source.offload_folder
        how["max_memory"] = _memory(source.max_memory)
    if source.stream is not None:
        how["device_map"] = {"": "disk"}
        how["offload_folder"] = offload_to(source.offload_folder)
    try:
        model = causal_lm(config).from_pretrained(origin, **access, **remote, **how, **source.model_kwargs)
    except OSError as error:
        if not source.allow_pickle:
            explain_pickle(origin, source.model_id, access, error)
        raise
    return model, tokenizer


def _memory(limits: Mapping[Any, str | int] | None) -> dict[str | int, str | int] | None:
    """Number devices by integers, as accelerate does, also where they came as text."""
    if limits is None:
        return None
    return {int(k) if str(k).isdigit() else k: int(v) if str(v).isdigit() else v for k, v in limits.items()}
