"""Files: strict JSON and safetensors, written whole or not at all, read with checks."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, NonFiniteError, UsageError
from ffnscope.saving import replacing
from ffnscope.types import Budget, ChannelStats, FFNSite, ObservedSite, PruningPlan, Scores

SCHEMA = 1
CHECKSUM = "checksum"
_TENSORS = "tensors_crc32"


@contextlib.contextmanager
def disposable(outcome: str) -> Generator[None]:
    """Add to an ArtifactError that the file may be deleted, and what happens then: for what is made without asking."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{error} Delete it, and {outcome}.") from error


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN, no infinity) atomically."""
    write_text(path, _strict(path, value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read strict JSON; a missing or damaged file, or one with NaN, is an ArtifactError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}): damaged, or another kind of file.") from error


def write_state(path: Path, value: Mapping[str, Any]) -> None:
    """Write the state of unfinished work as strict JSON with a checksum, atomically."""
    write_json(path, _with_checksum(path, value))


def read_state(path: Path) -> Any:
    """Read what `write_state` wrote; besides what `read_json` refuses, a changed byte is an ArtifactError.

    JSON without a checksum, of an earlier version, is read as it is.
    """
    value = read_json(path)
    return _checked(path, value, "content") if isinstance(value, dict) else value


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV, atomically."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write safetensors with ``facts`` (JSON) and checksums of facts and tensors in the header, atomically."""
    from safetensors.torch import save_file

    separate = _separate(tensors)
    told = _with_checksum(path, {"schema": SCHEMA, **facts, _TENSORS: checksum_tensors(separate)})
    with replacing(path) as part:
        save_file(separate, part, metadata={"ffnscope": _strict(path, told)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; a missing, damaged or foreign file is an ArtifactError.

    Every byte is compared with the checksums, where the file has them: those of earlier versions have none.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    facts = _facts(path, header)
    if facts.pop(_TENSORS, None) not in (None, checksum_tensors(tensors)):
        raise _changed(path, "tensors")
    return tensors, facts


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a file without its tensors; errors as in `read_tensors`."""
    with _opened(path) as file:
        facts = _facts(path, file.metadata() or {})
    facts.pop(_TENSORS, None)
    return facts


@contextlib.contextmanager
def _opened(path: Path) -> Generator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise ArtifactError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} cannot be read ({error}): damaged, or another kind of file.") from error


def _facts(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if "ffnscope" not in header:
        raise ArtifactError(f"{path} is a safetensors file, but ffnscope did not write it.")
    try:
        facts = json.loads(header["ffnscope"])
    except ValueError as error:
        raise ArtifactError(f"{path} has a damaged header ({error}).") from error
    if not isinstance(facts, dict):
        raise ArtifactError(f"{path} has a damaged header: its facts are no mapping.")
    return _checked(path, cast("dict[str, Any]", facts), "header")


def _checked(path: Path, value: dict[str, Any], what: str) -> dict[str, Any]:
    """A mapping without its checksum, once that is checked."""
    if not _is_intact(path, value):
        raise _changed(path, what)
    return value


def _is_intact(path: Path, value: dict[str, Any]) -> bool:
    """Take the checksum out of a mapping; whether it is that of the rest, or was not there."""
    return value.pop(CHECKSUM, None) in (None, _with_checksum(path, value)[CHECKSUM])


def _with_checksum(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    text = _strict(path, value).encode(errors="surrogatepass")
    return {**value, CHECKSUM: hashlib.blake2b(text, digest_size=16).hexdigest()}


def _changed(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged: the checksum of its {what} is not the one that was written. Make it again, or take an "
        "intact copy."
    )


def checksum_tensors(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names, shapes, dtypes and bytes: finds damage for a fifth of the CPU time of a cryptographic hash."""
    found = 0
    for part in _parts(sorted(tensors.items())):
        found = zlib.crc32(part, found)
    return found


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
    with complete(path, "statistics"):
        for row in facts.pop("sites"):
            site = (ObservedSite if "kind" in row["site"] else FFNSite)(**row["site"])
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
    found: dict[str, Scores] = {}
    with complete(path, "scores"):
        sites = {name: FFNSite(**row) for name, row in facts.pop("sites").items()}
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
                "site": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(site).items()},
                "width": kept.numel(),
                "kept": kept.tolist(),
                "protected": plan.protected[site].tolist() if site in plan.protected else [],
            }
            for site, kept in plan.kept.items()
        ],
    }


def write_plan(path: Path, plan: PruningPlan) -> None:
    """Save a plan as JSON with a checksum, one line per list of channels, so that it can be read and edited by hand."""
    value = _with_checksum(path, plan_to_dict(plan))
    sites = value.pop("sites")
    head = _strict(path, value, indent=2).removesuffix("\n}")
    rows = ",\n".join("    " + _strict(path, row) for row in sites)
    write_text(path, f'{head},\n  "sites": [\n{rows}\n  ]\n}}\n')


def read_plan(path: Path) -> PruningPlan:
    """Load a plan; warns of an edited or damaged one, raises ArtifactError or UsageError for an impossible one."""
    value = read_json(path)
    intact = not isinstance(value, dict) or _is_intact(path, cast("dict[str, Any]", value))
    plan = plan_from_dict(path, value)
    if not intact:
        warnings.warn(f"{path} was edited (then delete its line {CHECKSUM!r}) or is damaged.", stacklevel=2)
    return plan


def plan_from_dict(path: Path, value: Any) -> PruningPlan:
    """The plan of which `plan_to_dict` gave this form; errors name the file that it was in."""
    expect_kind(path, value, "plan")
    kept: dict[FFNSite, Tensor] = {}
    protected: dict[FFNSite, Tensor] = {}
    with complete(path, "plan"):
        for row in value["sites"]:
            site = FFNSite(**row["site"])
            kept[site] = _indices(row["kept"])
            if row.get("protected"):
                protected[site] = _indices(row["protected"])
        budget = Budget(**value["budget"])
        return PruningPlan(kept, value["metric"], value["allocator"], budget, protected, value.get("provenance", {}))


def expect_kind(path: Path, value: Any, kind: str) -> None:
    """Raise unless the file says that it is of this kind, and of a schema that this version reads."""
    found = value.get("kind") if isinstance(value, dict) else None
    if found != kind:
        raise ArtifactError(f"{path} holds {found or 'something else'!r}; expected a file of kind {kind!r}.")
    schema = value.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ArtifactError(f"{path} has schema {schema}; this version reads up to {SCHEMA}: update ffnscope.")


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
    for part in _parts(tensors):
        digest.update(part)
    return digest.hexdigest()


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """What identifies named tensors: of each, its name, shape and dtype, and then its bytes."""
    for name, value in tensors:
        yield f"{name}:{tuple(value.shape)}:{value.dtype};".encode()
        flat = value.detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data


@contextlib.contextmanager
def complete(path: Path, kind: str) -> Generator[None]:
    """Name the file when something in it is missing, of a wrong type, or impossible."""
    try:
        yield
    except (UsageError, NonFiniteError) as error:
        raise type(error)(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ArtifactError(f"{path} is not a complete file of kind {kind!r}: {what}.") from error


def _indices(values: Any) -> Tensor:
    if not isinstance(values, list) or any(type(v) is not int for v in values):
        raise TypeError("channels must be a list of integers")
    return torch.tensor(values, dtype=torch.int64)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory (the file format refuses that)."""
    found = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: set[int] = set()
    for name, value in found.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def _strict(path: Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise ArtifactError(f"{path.name} would hold NaN or infinity, which JSON cannot: {error}.") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Tensor):
        return str(value) if isinstance(value, Path) else value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
