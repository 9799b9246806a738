"""The run folder: made, continued, or refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import yaml

from ffnscope.apply.folder import held, is_unfinished, sweep
from ffnscope.errors import ArtifactError
from ffnscope.io import read_json, write_json, write_text
from ffnscope.run.load import dump_config
from ffnscope.run.schema import RunConfig
from ffnscope.saving import check_writable, writing

CONFIG = "experiment_config.yaml"
LOG_FILE = "run.log"
LEDGER = "ledger.json"
LEFT_TO_MODEL = ("calibration.num_samples", "metrics.scar.num_samples")
"""Keys that may be null until the model is loaded; whether its text is the same, the ledger knows."""


@contextlib.contextmanager
def open_folder(config: RunConfig, *, overwrite: bool = False) -> Generator[Path]:
    """Make the run folder, or continue one of the same configuration, and hold it for this process.

    Raises:
        ArtifactError: as `check_folder`; or another process runs in the folder, or it cannot be written.
    """
    check_folder(config, overwrite=overwrite)
    folder = config.output_dir
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        check_folder(config, overwrite=overwrite)  # of another process, between the first check and the lock
        sweep(folder)
        record_config(folder, config)
        yield folder


def record_config(folder: Path, config: RunConfig) -> None:
    """Write the configuration of a run, unless the file is the same already."""
    path, text = folder / CONFIG, dump_config(config)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def check_folder(config: RunConfig, *, overwrite: bool = False) -> None:
    """Refuse a folder that is not this run's, or that cannot be written; nothing stays in it.

    A folder in which no stage was begun holds nothing to protect, so a configuration that failed at once can be
    mended and run again.

    Raises:
        ArtifactError: it is a file, or ``overwrite`` is not set and it holds something else, or results of another
            configuration. With ``overwrite``, stages whose inputs did not change are kept and the others replaced.
    """
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; output.dir must be a folder.")
    check_writable(folder)
    with writing(folder):
        found = folder.iterdir() if folder.exists() else ()
        held = {path.name for path in found if not is_unfinished(path)}
    if overwrite or held <= {CONFIG, LOG_FILE, LEDGER}:
        return
    if CONFIG not in held:
        raise ArtifactError(
            f"{folder} is not empty and holds no {CONFIG}, so it is not a run of ffnscope. Choose another output.dir, "
            "or pass --overwrite to write into it."
        )
    changed = differing(_read(folder / CONFIG), yaml.safe_load(dump_config(config)))
    if changed:
        raise ArtifactError(
            f"{folder} holds a run of another configuration (different: {', '.join(changed[:6])}"
            f"{' ...' if len(changed) > 6 else ''}), or its {CONFIG} was edited or damaged. Choose another output.dir, "
            "or pass --overwrite to bring it up to date: stages whose inputs did not change are kept."
        )


def differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings, except where the output goes."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        left = new is None and prefix in LEFT_TO_MODEL
        return [] if old == new or prefix == "output.dir" or left else [prefix or "everything"]
    found: list[str] = []
    for key in {**old, **new}:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        found += differing(old.get(key), new.get(key), dotted)
    return found


def write_if_changed(path: Path, value: Any) -> bool:
    """Write strict JSON, unless the file holds the same already; tell whether it was written."""
    with contextlib.suppress(ArtifactError):
        if read_json(path) == json.loads(json.dumps(value)):  # a tuple is read as a list
            return False
    write_json(path, value)
    return True


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArtifactError(
            f"{path} cannot be read, so it is not known what the folder holds ({str(error).splitlines()[0]}). Choose "
            "another output.dir, or pass --overwrite: stages whose inputs did not change are kept."
        ) from error
