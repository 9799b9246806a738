"""The run folder: made, continued, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ffnscope.errors import ArtifactError
from ffnscope.io import write_text
from ffnscope.run.load import dump_config
from ffnscope.run.schema import RunConfig

CONFIG = "experiment_config.yaml"


def open_folder(config: RunConfig, *, overwrite: bool = False) -> Path:
    """Make the run folder, or continue one of the same configuration.

    Raises:
        ArtifactError: the folder holds something else, or results of another configuration, and ``overwrite`` is not
            set. With it, stages whose inputs did not change are kept and the others are replaced.
    """
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; output.dir must be a folder.")
    known = folder / CONFIG
    text = dump_config(config)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        if not known.exists():
            raise ArtifactError(
                f"{folder} is not empty and holds no {CONFIG}, so it is not a run of ffnscope. Choose another "
                "output.dir, or pass --overwrite to write into it."
            )
        changed = differing(yaml.safe_load(known.read_text(encoding="utf-8")), yaml.safe_load(text))
        if changed:
            raise ArtifactError(
                f"{folder} holds a run of another configuration (different: {', '.join(changed[:6])}"
                f"{' ...' if len(changed) > 6 else ''}). Choose another output.dir, or pass --overwrite to bring it up "
                "to date: stages whose inputs did not change are kept."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(known, text)
    return folder


def differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings, except where the output goes."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new or prefix == "output.dir" else [prefix or "everything"]
    found: list[str] = []
    for key in {**old, **new}:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        found += differing(old.get(key), new.get(key), dotted)
    return found
