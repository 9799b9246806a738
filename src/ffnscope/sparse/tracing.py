"""Tracing: run the dense model over a text and write the inputs of its FFNs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.forward import experts_per_token
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.projection import owner_of
from ffnscope.ffn.sites import find_sites
from ffnscope.io import SCHEMA, disposable, hash_json, read_tensors, write_state, write_tensors
from ffnscope.saving import writing
from ffnscope.sparse.ffn import check_site
from ffnscope.sparse.split import split_documents
from ffnscope.sparse.streaming import Inputs, OnRound, trace_rounds
from ffnscope.sparse.traces import INDEX, KIND, TOKENS, Traces, read_traces
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How traces are made.

    Attributes:
        batch_size: windows per forward.
        max_bytes: traces that would take more are refused before they begin.
        seed: splits the documents.
    """

    batch_size: int = 4
    max_bytes: int = 2**32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}.")


def traces_size(model: nn.Module, windows: Windows, sites: Sequence[FFNSite] | None = None) -> int:
    """Bytes of the traces that `trace` would write; the model is not run on the windows.

    For experts it is what they take when every token is given to as many as the config says.
    """
    groups: dict[str, list[int]] = {}
    for site in find_sites(model) if sites is None else sites:
        owner: Any = owner_of(model, site, site.up)
        weight: Tensor = getattr(owner, site.up.rpartition(".")[2]) if site.stacked else owner.weight
        row = site.d_model * weight.dtype.itemsize
        groups.setdefault(site.group, []).append(row if site.expert is None else row + torch.int64.itemsize)
    per_token = 2 * torch.int64.itemsize
    for rows in groups.values():
        per_token += max(rows) * min(experts_per_token(model, default=len(rows)), len(rows))
    return per_token * windows.n_tokens


def check_traces(
    model: nn.Module, windows: Windows, sites: Sequence[FFNSite], options: TraceOptions | None = None
) -> int:
    """Raise what `trace` would raise before it runs the model; returns `traces_size`."""
    options = options or TraceOptions()
    for site in sites:
        check_site(site)
    split_documents(tokens_of(windows)["document"], options.seed)
    return _checked_size(model, windows, sites, options.max_bytes)


def trace(
    model: nn.Module,
    windows: Windows,
    out: Path,
    *,
    sites: Sequence[FFNSite] | None = None,
    options: TraceOptions | None = None,
    on_round: OnRound | None = None,
) -> Traces:
    """Write the inputs of FFNs for every valid token of a text to a folder; see `Traces`.

    A model that is a chain of blocks is run block by block on hidden states that are kept; any other as a whole, once
    for each group of FFNs whose inputs fit into memory. Of each FFN the activations of the first batch are recomputed
    from its input and compared, so that what is no plain FFN is refused here.

    A call that was cut off goes on where it ended, with the blocks run again up to there; one that is complete is read.
    Until then the files are in ``.<name>.partial`` beside ``out``.

    For a split by document each window should hold one document alone (mode "lines"). Of contiguous windows, which may
    begin in one document and end in others, all tokens count as of the first.

    Args:
        model: a causal LM; left as it was.
        windows: text of three documents or more.
        out: folder to make.
        sites: FFNs to trace; None takes all.
        options: batch size, limit of bytes, seed of the split.
        on_round: see `OnRound`.

    Raises:
        UsageError: more than ``max_bytes``, fewer than three documents, or no FFN.
        NotAvailableError: an FFN whose channels are no function of gate, up and its input alone.
        NonFiniteError: an input is NaN or infinite.
        ArtifactError: ``out`` holds something else, or cannot be written.
    """
    options = options or TraceOptions()
    chosen = list(find_sites(model) if sites is None else sites)
    size = check_traces(model, windows, chosen, options)
    tokens = tokens_of(windows)
    parts = split_documents(tokens["document"], options.seed)
    hashes = {"weights_hash": weights_hash(model), "windows_hash": windows.hash}
    key = hash_json([hashes, windows.document.tolist(), [site.name for site in chosen]])
    if out.exists():
        return _finished(out, key, options.seed)
    partial = out.with_name(f".{out.name}.partial")
    files = {site: partial / f"site_{i:04d}.safetensors" for i, site in enumerate(chosen)}
    _write_sites(model, list(windows.batches(options.batch_size)), files, key, on_round)
    write_tensors(partial / TOKENS, tokens, {"kind": "trace tokens"})
    facts = {"key": key, **hashes, "source": windows.source, "bytes": size, "n_tokens": windows.n_tokens}
    facts |= {"seed": options.seed, "parts": {name: part.tolist() for name, part in parts.items()}}
    facts |= {"sites": [{"site": asdict(site), "file": file.name} for site, file in files.items()]}
    write_state(partial / INDEX, {"kind": KIND, "schema": SCHEMA, **facts})
    with writing(out):
        partial.rename(out)
    return read_traces(out)


def _write_sites(
    model: nn.Module, batches: Sequence[Windows], files: Mapping[FFNSite, Path], key: str, on_round: OnRound | None
) -> None:
    """Write the files of FFNs that are not there yet; when that fails, the model is left as it was at once."""
    todo = [site for site, file in files.items() if not _is_done(file, key)]
    if not todo:
        return
    with contextlib.closing(trace_rounds(model, todo, batches, on_round)) as rounds:
        for found in rounds:
            for site, one in found.items():
                write_inputs(files[site], one, {"kind": "trace", "key": key, "site": site.name})


def write_inputs(path: Path, one: Inputs, facts: Mapping[str, Any]) -> None:
    """Write the inputs of one FFN as `Traces` reads them."""
    tensors = {"x": one.x} if one.tokens is None else {"x": one.x, "tokens": one.tokens}
    write_tensors(path, tensors, {**facts, "activation": one.activation})


def tokens_of(windows: Windows) -> dict[str, Tensor]:
    """``document`` and ``window`` of every valid token, in the order of `Traces`."""
    counts = windows.valid.sum(1)
    window = torch.arange(len(windows)).repeat_interleave(counts)
    return {"document": windows.document.repeat_interleave(counts), "window": window}


def _checked_size(model: nn.Module, windows: Windows, sites: Sequence[FFNSite], limit: int) -> int:
    if not sites or not windows.n_tokens:
        raise UsageError("there is nothing to trace; give a text of at least one window and at least one FFN.")
    size = traces_size(model, windows, sites)
    if size > limit:
        raise UsageError(
            f"these traces would take {size / 2**20:,.1f} MiB ({windows.n_tokens:,} tokens, {len(sites)} FFNs); "
            f"max_bytes is {limit / 2**20:,.1f} MiB. Trace fewer windows or FFNs, or raise it (--max-traces GIB, "
            "contextual.max_traces)."
        )
    return size


def _finished(out: Path, key: str, seed: int) -> Traces:
    """Traces that are there already, if they are what is asked for."""
    found = read_traces(out) if (out / INDEX).exists() else None
    if found is None or (found.facts["key"], found.facts["seed"]) != (key, seed):
        what = (
            "holds something else" if found is None else "holds traces of another model, text, seed or choice of FFNs"
        )
        raise ArtifactError(f"{out} {what}. Choose another folder, or remove it.")
    return found


def _is_done(path: Path, key: str) -> bool:
    if not path.exists():
        return False
    with disposable("the FFN is traced again"):
        return read_tensors(path)[1].get("key") == key
