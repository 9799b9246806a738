"""Traces: inputs of every FFN for every token of a text, on disk; all else is recomputed from them and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, UsageError, unknown_name
from ffnscope.io import complete, expect_kind, read_state, read_tensors
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.split import PARTS, Part
from ffnscope.types import FFNSite

INDEX, TOKENS = "index.json", "tokens.safetensors"
KIND = "traces"


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

    def windows_of(self, windows: Windows, part: Part) -> Windows:
        """Those of the traced windows that begin in documents of one part."""
        return windows[torch.isin(windows.document, self.parts[part])]

    def fit_tokens(self, site: FFNSite, part: Part = "fit", *, lookahead: int = 0) -> FitTokens:
        """Tokens to make a predictor from; with ``lookahead`` 1 also the inputs of the FFN one layer before.

        Raises:
            UsageError: no token of this part reached the site, or there is no traced dense FFN in the layer before.
        """
        return self._fit_tokens(site, lookahead, part)

    def all_tokens(self, site: FFNSite, *, lookahead: int = 0) -> FitTokens:
        """The same of all documents."""
        return self._fit_tokens(site, lookahead, None)

    def before(self, site: FFNSite) -> FFNSite | None:
        """The dense FFN one layer before a dense one, if it was traced and is the only one there."""
        found = [s for s in self.files if s.layer == site.layer - 1 and s.expert is None]
        return found[0] if len(found) == 1 and site.expert is None else None

    def _fit_tokens(self, site: FFNSite, lookahead: int, part: Part | None) -> FitTokens:
        x, tokens = self._read(site)
        rows = torch.arange(len(tokens)) if part is None else self._in_part(tokens, part)
        earlier = self._read(self._source(site))[0][tokens[rows]] if lookahead else None
        return FitTokens(x[rows], self.document[tokens[rows]], earlier, self.window[tokens[rows]])

    def activation(self, site: FFNSite) -> str:
        """Name of the activation function with which the weights gave the model's activations, for `ffn_of`."""
        facts = read_tensors(self._file(site))[1]
        with complete(self._file(site), "trace"):
            return facts["activation"]

    def _source(self, site: FFNSite) -> FFNSite:
        found = self.before(site)
        if found is None:
            raise UsageError(
                f"a lookahead of 1 for {site.name} needs it to be dense, and one dense FFN in layer {site.layer - 1}, "
                "which these traces do not have. Use lookahead 0."
            )
        return found

    def _in_part(self, tokens: Tensor, part: Part) -> Tensor:
        if part not in PARTS:
            raise unknown_name("part of the traces", part, PARTS)
        return torch.isin(self.document[tokens], self.parts[part]).nonzero().flatten()

    def _read(self, site: FFNSite) -> tuple[Tensor, Tensor]:
        tensors, _ = read_tensors(self._file(site))
        with complete(self._file(site), "trace"):
            return tensors["x"], tensors.get("tokens", torch.arange(len(self.document)))

    def _file(self, site: FFNSite) -> Path:
        if site not in self.files:
            raise unknown_name("traced site", site.name, [s.name for s in self.files])
        return self.files[site]


def read_traces(path: Path) -> Traces:
    """Open what `trace` wrote. Inputs are read when they are asked for, one site at a time.

    Raises:
        ArtifactError: there are no finished traces at ``path``, or they are of a newer schema.
    """
    facts = read_state(path / INDEX)
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
