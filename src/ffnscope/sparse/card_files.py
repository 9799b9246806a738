"""Files of sparsity cards: strict JSON to read and diff, and beside it the tensors of predictors and policies."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffnscope.errors import ArtifactError
from ffnscope.io import complete, expect_kind, hash_file, hash_json, read_json, read_tensors, write_json, write_tensors
from ffnscope.sparse.card import Figure, LossChange, SiteCard, SparsityCard, WantedChannels
from ffnscope.sparse.certificate import Certificate
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.rule import SelectionRule
from ffnscope.types import FFNSite

KIND = "sparsity card"
CARD_SCHEMA = 1


def write_card(path: Path, card: SparsityCard, *, overwrite: bool = False) -> None:
    """Write a card as JSON to ``path`` and its tensors beside it, with the ending ``.safetensors``.

    Raises:
        ArtifactError: the path does not end in ``.json``, a card is there already and may not be replaced, or it cannot
            be written.
    """
    if path.suffix != ".json":
        raise ArtifactError(f"a card is written as JSON; got {path.name}. Choose a name such as card.json.")
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} exists. Choose another name, or remove it.")
    value: dict[str, Any] = {
        "kind": KIND,
        "schema": CARD_SCHEMA,
        "ffnscope": importlib.metadata.version("ffnscope"),
        "rule": asdict(card.rule),
        "wanted": asdict(card.wanted),
        "target": {"measure": card.target[0], "value": card.target[1]},
        "bytes_of": UNIT,
        "sites": [asdict(one) for one in card.sites],
        "figures": _plain_figures(card.figures),
        "loss": {source: asdict(one) for source, one in card.loss.items()},
        "certificate": None if card.certificate is None else asdict(card.certificate),
        "allocation": dict(card.allocation),
        "facts": dict(card.facts),
    }
    tensors = path.with_suffix(".safetensors")
    write_tensors(tensors, card.tensors, {"kind": f"tensors of a {KIND}"})
    value["tensors"] = {"file": tensors.name, "sha256": hash_file(tensors)}
    value["hash"] = hash_json(value)
    write_json(path, value)


def read_card(path: Path | str) -> SparsityCard:
    """Read what `write_card` wrote. Whether it is for a model is checked when it is used with one.

    Raises:
        ArtifactError: another schema, a changed or damaged file, or tensors that are not those of this card.
    """
    path = Path(path)
    value = read_json(path)
    expect_kind(path, value, KIND)
    if value.get("schema") != CARD_SCHEMA:
        raise ArtifactError(
            f"{path} has schema {value.get('schema')}; this version reads {CARD_SCHEMA}. Calibrate again."
        )
    if value.get("bytes_of") != UNIT:
        raise ArtifactError(
            f"{path} counts bytes in {value.get('bytes_of', 'the dtype of its model')}; this version reads cards that "
            f"count {UNIT}. Calibrate again."
        )
    with complete(path, KIND):
        stated = value.pop("hash")
        if hash_json(value) != stated:
            raise ArtifactError(
                f"{path} was changed after it was written, so its figures and promises hold no longer. Restore it, or "
                "calibrate again."
            )
        file = path.with_name(value["tensors"]["file"])
        if not file.exists():
            raise ArtifactError(f"{file} is missing; a card needs the tensors that were written beside it.")
        if hash_file(file) != value["tensors"]["sha256"]:
            raise ArtifactError(f"{file} is not the file that was written with {path.name}: damaged, or another one.")
        return _card(value, read_tensors(file)[0])


def _card(value: Mapping[str, Any], tensors: Mapping[str, Any]) -> SparsityCard:
    stated, target = value["certificate"], value["target"]
    return SparsityCard(
        rule=SelectionRule(**value["rule"]),
        wanted=WantedChannels(**value["wanted"]),
        target=(target["measure"], target["value"]),
        sites=tuple(_site_card(row) for row in value["sites"]),
        figures=_figures(value["figures"]),
        loss={source: LossChange(**row) for source, row in value["loss"].items()},
        certificate=None if stated is None else Certificate(**stated),
        allocation=value["allocation"],
        tensors=tensors,
        facts=value["facts"],
    )


def _site_card(row: Mapping[str, Any]) -> SiteCard:
    plain = {
        name: row[name] for name in ("activation", "parameter", "density", "bytes_read", "bytes_dense", "break_even")
    }
    bands = {name: (low, high) for name, (low, high) in row["bands"].items()}
    source = None if row.get("source") is None else FFNSite(**row["source"])
    return SiteCard(site=FFNSite(**row["site"]), **plain, bands=bands, figures=_figures(row["figures"]), source=source)


def _figures(value: Mapping[Any, Any]) -> dict[Any, dict[str, Figure]]:
    return {source: {name: Figure(**row) for name, row in rows.items()} for source, rows in value.items()}


def _plain_figures(value: Mapping[Any, Mapping[str, Figure]]) -> dict[str, Any]:
    return {source: {name: asdict(row) for name, row in rows.items()} for source, rows in value.items()}
