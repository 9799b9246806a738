"""What a comparison has measured so far: one number per row and window, saved so that it can go on after a stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.offload import named_values
from ffnscope.io import SCHEMA, disposable, expect_kind, hash_json, hash_tensors, plan_to_dict, read_state, write_state

DENSE = "dense"
KIND = "comparison"
SAMPLED = 256  # values per weight that identify a model

Row = dict[str, list[float | None]]


@dataclass(slots=True)
class Progress:
    """Sums per row and window.

    Attributes:
        path: file that holds them, or None.
        of: what they belong to: hash of the text, fingerprint of the model, schema of the file.
        n_windows: length of every list.
        rows: key of a row -> quantity -> one sum per window, None where it is missing.
    """

    path: Path | None
    of: Mapping[str, str | int]
    n_windows: int
    rows: dict[str, Row] = field(default_factory=dict[str, Row])

    def has(self, key: str, part: slice) -> bool:
        """Whether a row has numbers for all windows of a batch."""
        row = self.rows.get(key)
        return row is not None and all(value is not None for values in row.values() for value in values[part])

    def put(self, key: str, part: slice, sums: Mapping[str, Tensor]) -> None:
        """Store the sums [b] of one batch of one row."""
        row = self.rows.setdefault(key, {name: [None] * self.n_windows for name in sums})
        for name, value in sums.items():
            row[name][part] = value.tolist()

    def total(self, key: str, name: str) -> Tensor:
        """All windows' sums [n] of one quantity of a finished row, fp64."""
        return torch.tensor(self.rows[key][name], dtype=torch.float64)

    def save(self) -> None:
        """Write the file (atomically), if there is one."""
        if self.path is not None:
            write_state(self.path, {"kind": KIND, **self.of, "n_windows": self.n_windows, "rows": self.rows})


def open_progress(path: Path | None, model: nn.Module, windows: Windows) -> Progress:
    """Continue from the file if it belongs to this text and this model, else start anew.

    Raises:
        ArtifactError: the file is damaged or of another kind.
    """
    fresh = Progress(path, {"schema": SCHEMA, "text": windows.hash, "model": fingerprint(model)}, len(windows))
    if path is None or not path.exists():
        return fresh
    with disposable("everything is measured anew"):
        value: dict[str, Any] = read_state(path)
        expect_kind(path, value, KIND)
        if any(value.get(name) != found for name, found in fresh.of.items()):
            return fresh
        rows: dict[str, Row] = value.get("rows", {})
        if any(len(values) != len(windows) for row in rows.values() for values in row.values()):
            raise ArtifactError(f"{path} does not hold one number per window ({len(windows)}).")
    fresh.rows = rows
    return fresh


def check_labels(plans: Iterable[str]) -> None:
    """Raise UsageError when a plan has the label of the unpruned model."""
    if DENSE in plans:
        raise UsageError(f"a plan cannot be called {DENSE!r}: that is the label of the unpruned model. Rename it.")


def plan_key(pruned: Pruned) -> str:
    """Hash of what a plan asks and keeps, and of its new weights; where it came from does not matter."""
    value = plan_to_dict(plan_of(pruned))
    value.pop("provenance")
    if isinstance(pruned, Reconstruction):
        value["weights"] = hash_tensors(pruned.tensors.items())
    return hash_json(value)


def fingerprint(model: nn.Module) -> str:
    """Hash of every weight's name, shape, dtype, sum of bits and about 256 evenly spaced values.

    A change of one value always changes it; it costs one read of the weights where they are, no copy and no hash of all
    bytes. Weights that are offloaded to disk have to be read, as in a forward.
    """
    parts = ((f"{name}{tuple(value.shape)}", value.detach().reshape(-1)) for name, value in named_values(model))
    return hash_tensors((name, one) for label, flat in parts for name, one in _brief(label, flat))


def _brief(name: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, flat[:: max(1, flat.numel() // SAMPLED)]
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    yield f"{name} bits", bits.sum(dtype=torch.int64)
