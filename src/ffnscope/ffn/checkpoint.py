"""What a checkpoint is, found out before its weights are read; what cannot be loaded is refused with the cure."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from ffnscope.errors import ModelError


def check_folder(path: Path) -> None:
    """Raise ModelError unless a folder holds a checkpoint of `transformers`."""
    if (path / "config.json").exists():
        return
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path} holds only an adapter (PEFT). Merge it into its base model and save that.")
    found = next(path.glob("*.gguf"), None)
    hint = f" Give the file itself: {found}." if found else ""
    raise ModelError(f"{path} is a directory without config.json; expected a checkpoint saved by transformers.{hint}")


def find_commit(repo: str, revision: str | None, access: Mapping[str, Any]) -> str | None:
    """Fetch the config of a hub model and return the commit that it belongs to.

    Args:
        repo: hub id.
        revision: commit, tag or branch; None = the main branch.
        access: ``cache_dir``, ``token`` and ``local_files_only``.

    Raises:
        ModelError: the repository holds no checkpoint of `transformers`.
        OSError: whatever the hub answers.
    """
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(repo, "config.json", revision=revision, **access)
    if found is None:
        raise ModelError(
            f"cannot load {repo!r}: it has no config.json, so it is no checkpoint of transformers. Download a .gguf "
            "file of it and give that, merge an adapter into its base model, or give another hub id."
        )
    folder = Path(found).parent
    return folder.name if folder.parent.name == "snapshots" else None


def hub_bytes(repo: str, access: Mapping[str, Any]) -> int | None:
    """Size of a hub model's safetensors by its index, or by the file in the cache; None where neither is there."""
    from transformers.utils.hub import cached_file

    try:
        index = cached_file(repo, "model.safetensors.index.json", **access)
        size = None if index is None else json.loads(Path(index).read_text())["metadata"].get("total_size")
        return None if size is None else int(size)
    except OSError:  # no index: one file, of which only a copy that is here tells its size
        pass
    try:
        file = cached_file(repo, "model.safetensors", **{**access, "local_files_only": True})
    except OSError:
        return None
    return None if file is None else Path(file).stat().st_size


def check_architecture(origin: str, model_id: str, access: Mapping[str, Any]) -> None:
    """Raise ModelError when the installed `transformers` has no code for a checkpoint, whose own may not run."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    raw: dict[str, Any] = PreTrainedConfig.get_config_dict(origin, **access)[0]
    kind = raw.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise ModelError(
            f"cannot load {model_id!r}: its architecture {kind!r} is not part of transformers, and the code that "
            "comes with the checkpoint runs only when you allow it. Read that code; if you trust it, set "
            "model.trust_remote_code (--trust-remote-code)."
        )
    raise ModelError(
        f"cannot load {model_id!r}: its architecture {kind!r} (model_type in config.json) is not known to "
        f"transformers {__version__}, which is installed. Update it: pip install -U transformers."
    )


def check_causal(config: Any, model_id: str) -> None:
    """Raise ModelError for an architecture that is no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None):
        return
    raise ModelError(
        f"cannot load {model_id!r}: {config.model_type!r} is no causal language model in transformers. Give a model "
        "that generates text from left to right."
    )


def explain_pickle(origin: str, model_id: str, access: Mapping[str, Any], error: OSError) -> None:
    """Raise ModelError when safetensors were not found because the weights are pickle files; else do nothing."""
    from transformers.utils.hub import has_file

    if any(has_file(origin, name, **access) for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        raise ModelError(
            f"cannot load {model_id!r}: its weights are pickle files (pytorch_model.bin), which can run code when they "
            "are loaded. Use a safetensors version of it; or, if you trust the files, set model.allow_pickle "
            "(--allow-pickle)."
        ) from error


@contextlib.contextmanager
def no_conversion() -> Generator[None]:
    """Keep `transformers` from asking a public service to convert a pickle checkpoint: that sends it the token."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    try:
        os.environ[name] = "1"
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
