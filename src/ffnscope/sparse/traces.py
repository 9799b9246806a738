"""Traces: inputs of every FFN for every token of a text, on disk; all else is recomputed from them and the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.forward import experts_per_token
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, UsageError, unknown_name
from ffnscope.ffn.projection import owner_of
from ffnscope.ffn.sites import find_sites
from ffnscope.io import (
    SCHEMA,
    complete,
    disposable,
    expect_kind,
    hash_json,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    writing,
)
from ffnscope.sparse.ffn import check_site
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.split import PARTS, Part, split_documents
from ffnscope.sparse.streaming import OnRound, trace_rounds
from ffnscope.types import FFNSite

INDEX, TOKENS = "index.json", "tokens.safetensors"
KIND = "traces"


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


@dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """Inputs x of FFNs on disk. Rows are the valid tokens, window by window, in the order of the text.

    An expert has only the tokens that are routed to it, in the order in which it is given them.

    Attributes:
        path: the folder.
        files: site -> its file.
        document: document of each token [n_tokens]: the one that its window begins in.
        window: index of the window of each token [n_tokens].
        parts: part -> its documents.
        facts: the index as it was written (hashes of weights and text, seed of the split, bytes, ...).
    """

    path: Path
    files: Mapping[FFNSite, Path]
    document: Tensor
    window: Tensor
    parts: Mapping[Part, Tensor]
    facts: Mapping[str, Any]

    @property
    def sites(self) -> tuple[FFNSite, ...]:
        """Traced FFNs, in the order of the model."""
        return tuple(self.files)

    def x(self, site: FFNSite, part: Part | None = None) -> Tensor:
        """Inputs of a site [n, d_model] in the dtype of the model, of all tokens or of one part of the documents."""
        x, tokens = self._read(site)
        return x if part is None else x[self._in_part(tokens, part)]

    def tokens(self, site: FFNSite, part: Part | None = None) -> Tensor:
        """Which tokens these are: [n] int64, indices of ``document`` and ``window``."""
        tokens = self._read(site)[1]
        return tokens if part is None else tokens[self._in_part(tokens, part)]

    def fit_tokens(self, site: FFNSite, part: Part = "fit", *, lookahead: int = 0) -> FitTokens:
        """Tokens to make a predictor from; with ``lookahead`` 1 also the inputs of the FFN one layer before.

        Raises:
            UsageError: no token of this part reached the site, or there is no traced dense FFN in the layer before.
        """
        x, tokens = self._read(site)
        rows = self._in_part(tokens, part)
        earlier = self._read(self._before(site))[0][tokens[rows]] if lookahead else None
        return FitTokens(x[rows], self.document[tokens[rows]], earlier)

    def _before(self, site: FFNSite) -> FFNSite:
        found = [s for s in self.files if s.layer == site.layer - 1 and s.expert is None]
        if len(found) != 1 or site.expert is not None:
            raise UsageError(
                f"a lookahead of 1 for {site.name} needs one dense FFN in layer {site.layer - 1}; these traces have "
                f"{len(found)}. Use lookahead 0."
            )
        return found[0]

    def _in_part(self, tokens: Tensor, part: Part) -> Tensor:
        if part not in PARTS:
            raise unknown_name("part of the traces", part, PARTS)
        return torch.isin(self.document[tokens], self.parts[part]).nonzero().flatten()

    def _read(self, site: FFNSite) -> tuple[Tensor, Tensor]:
        if site not in self.files:
            raise unknown_name("traced site", site.name, [s.name for s in self.files])
        tensors, _ = read_tensors(self.files[site])
        with complete(self.files[site], "trace"):
            return tensors["x"], tensors.get("tokens", torch.arange(len(self.document)))


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
    for site in chosen:
        check_site(site)
    documents = windows.document.repeat_interleave(windows.valid.sum(1))
    parts = split_documents(documents, options.seed)
    size = _checked_size(model, windows, chosen, options.max_bytes)
    hashes = {"weights_hash": weights_hash(model), "windows_hash": windows.hash}
    key = hash_json([hashes, windows.document.tolist(), [site.name for site in chosen]])
    if out.exists():
        return _finished(out, key, options.seed)
    partial = out.with_name(f".{out.name}.partial")
    files = {site: f"site_{i:04d}.safetensors" for i, site in enumerate(chosen)}
    todo = [site for site in chosen if not _is_done(partial / files[site], key)]
    if todo:
        for found in trace_rounds(model, todo, list(windows.batches(options.batch_size)), on_round):
            for site, tensors in found.items():
                write_tensors(partial / files[site], tensors, {"kind": "trace", "key": key, "site": site.name})
    window = torch.arange(len(windows)).repeat_interleave(windows.valid.sum(1))
    write_tensors(partial / TOKENS, {"document": documents, "window": window}, {"kind": "trace tokens"})
    facts = {"kind": KIND, "schema": SCHEMA, "key": key, **hashes, "source": windows.source, "bytes": size}
    facts |= {"n_tokens": windows.n_tokens, "seed": options.seed}
    facts |= {"parts": {name: part.tolist() for name, part in parts.items()}}
    facts |= {"sites": [{"site": asdict(site), "file": files[site]} for site in chosen]}
    write_json(partial / INDEX, facts)
    with writing(out):
        partial.rename(out)
    return read_traces(out)


def read_traces(path: Path) -> Traces:
    """Open what `trace` wrote. Inputs are read when they are asked for, one site at a time.

    Raises:
        ArtifactError: there are no finished traces at ``path``, or they are of a newer schema.
    """
    facts = read_json(path / INDEX)
    expect_kind(path / INDEX, facts, KIND)
    tensors, _ = read_tensors(path / TOKENS)
    with complete(path / INDEX, KIND):
        files = {FFNSite(**row["site"]): path / row["file"] for row in facts["sites"]}
        parts: dict[Part, Tensor] = {name: torch.tensor(facts["parts"][name]) for name in PARTS}
        found = Traces(path, files, tensors["document"], tensors["window"], parts, facts)
    missing = [file.name for file in files.values() if not file.exists()]
    if missing:
        raise ArtifactError(f"{path} is incomplete: {missing[0]} is missing. Trace again.")
    return found


def _checked_size(model: nn.Module, windows: Windows, sites: Sequence[FFNSite], limit: int) -> int:
    if not sites or not windows.n_tokens:
        raise UsageError("there is nothing to trace; give a text of at least one window and at least one FFN.")
    size = traces_size(model, windows, sites)
    if size > limit:
        raise UsageError(
            f"these traces would take {size / 2**20:,.1f} MiB ({windows.n_tokens:,} tokens, {len(sites)} FFNs); "
            f"max_bytes is {limit / 2**20:,.1f} MiB. Trace fewer windows or FFNs, or raise max_bytes."
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
