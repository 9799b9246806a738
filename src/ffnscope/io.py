"""Files: strict JSON and safetensors, written to a temporary name and renamed, read with checks."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

SCHEMA = 1


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path beside ``path``; rename it when the block succeeds, remove it when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    part = Path(temporary)
    try:
        yield part
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN, no infinity) atomically."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise ArtifactError(f"{path.name} would hold NaN or infinity, which JSON cannot: {error}.") from error
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is an ArtifactError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}); delete it to make it again.") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV, atomically."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write safetensors with ``facts`` (JSON) in the header, atomically."""
    from safetensors.torch import save_file

    header = {"ffnscope": json.dumps({"schema": SCHEMA, **facts}, allow_nan=False, default=_plain)}
    with replacing(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata=header)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; a missing, damaged or foreign file is an ArtifactError."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise ArtifactError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete it to make it again.") from error
    if "ffnscope" not in header:
        raise ArtifactError(f"{path} is a safetensors file, but ffnscope did not write it.")
    facts = json.loads(header["ffnscope"])
    if facts.get("schema", 0) > SCHEMA:
        raise ArtifactError(f"{path} has schema {facts['schema']}; this version reads up to {SCHEMA}: update ffnscope.")
    return tensors, facts


def write_stats(path: Path, stats: Iterable[ChannelStats], facts: Mapping[str, Any]) -> None:
    """Save channel statistics of several sites in one file."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for part in stats:
        tensors |= {f"{part.site.name}/{k}": v for k, v in part.values.items()}
        rows.append({"site": asdict(part.site), "counts": dict(part.counts), "reductions": dict(part.reductions)})
    write_tensors(path, tensors, {"kind": "statistics", "sites": rows, **facts})


def read_stats(path: Path) -> tuple[dict[FFNSite, ChannelStats], dict[str, Any]]:
    """Load what `write_stats` wrote."""
    tensors, facts = read_tensors(path)
    expect_kind(path, facts, "statistics")
    found: dict[FFNSite, ChannelStats] = {}
    for row in facts.pop("sites"):
        site = FFNSite(**row["site"])
        values = {k: tensors[f"{site.name}/{k}"] for k in row["counts"]}
        found[site] = ChannelStats(site, values, row["counts"], row["reductions"])
    return found, facts


def write_scores(path: Path, scores: Iterable[Scores], facts: Mapping[str, Any]) -> None:
    """Save the scores of several metrics (every channel) in one file."""
    tensors: dict[str, Tensor] = {}
    metrics: dict[str, Any] = {}
    sites: dict[str, Any] = {}
    for one in scores:
        tensors |= {f"{one.metric}/{site.name}": v for site, v in one.values.items()}
        sites |= {site.name: asdict(site) for site in one.values}
        metrics[one.metric] = {"facts": dict(one.facts), "sites": [s.name for s in one.values]}
    write_tensors(path, tensors, {"kind": "scores", "sites": sites, "metrics": metrics, **facts})


def read_scores(path: Path) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Load what `write_scores` wrote: metric name -> scores, and the facts of the file."""
    tensors, facts = read_tensors(path)
    expect_kind(path, facts, "scores")
    sites = {name: FFNSite(**row) for name, row in facts.pop("sites").items()}
    found: dict[str, Scores] = {}
    for name, row in facts.pop("metrics").items():
        found[name] = Scores(name, {sites[s]: tensors[f"{name}/{s}"] for s in row["sites"]}, row["facts"])
    return found, facts


def plan_to_dict(plan: PruningPlan) -> dict[str, Any]:
    """Plain JSON form of a plan."""
    return {
        "kind": "plan",
        "schema": SCHEMA,
        "metric": plan.metric,
        "allocator": plan.allocator,
        "budget": asdict(plan.budget),
        "sparsity": plan.sparsity,
        "provenance": dict(plan.provenance),
        "sites": [
            {
                "site": asdict(site),
                "width": kept.numel(),
                "kept": kept.tolist(),
                "protected": plan.protected[site].tolist() if site in plan.protected else [],
            }
            for site, kept in plan.kept.items()
        ],
    }


def write_plan(path: Path, plan: PruningPlan) -> None:
    """Save a plan as JSON, one line per list of channels, so that it can be read and edited by hand."""
    value = plan_to_dict(plan)
    sites = value.pop("sites")
    head = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)[:-2]
    rows = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in sites)
    write_text(path, f'{head},\n  "sites": [\n{rows}\n  ]\n}}\n')


def read_plan(path: Path) -> PruningPlan:
    """Load a plan; raises ArtifactError for another kind of file and UsageError for an impossible plan."""
    value = read_json(path)
    expect_kind(path, value, "plan")
    try:
        kept: dict[FFNSite, Tensor] = {}
        protected: dict[FFNSite, Tensor] = {}
        for row in value["sites"]:
            site = FFNSite(**row["site"])
            kept[site] = torch.tensor(row["kept"], dtype=torch.int64)
            if row.get("protected"):
                protected[site] = torch.tensor(row["protected"], dtype=torch.int64)
        budget = Budget(**value["budget"])
        return PruningPlan(kept, value["metric"], value["allocator"], budget, protected, value.get("provenance", {}))
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a complete pruning plan: {error} is missing or wrong.") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def expect_kind(path: Path, value: Any, kind: str) -> None:
    """Raise unless the file says that it is of this kind."""
    found = value.get("kind") if isinstance(value, dict) else None
    if found != kind:
        raise ArtifactError(f"{path} holds {found or 'something else'!r}; expected a file of kind {kind!r}.")


def hash_json(value: Any) -> str:
    """Stable short hash of a plain value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors: names, shapes, dtypes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors:
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
