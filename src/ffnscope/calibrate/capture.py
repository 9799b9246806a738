"""Capture: token-level channel activations, and their gradients, streamed to files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.captured import INDEX, KIND, Capture, new_folder, read_capture
from ffnscope.calibrate.forward import experts_per_token
from ffnscope.calibrate.observe import not_finite, observe_batch
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.projection import owner_of, reuse
from ffnscope.ffn.sites import find_sites
from ffnscope.io import SCHEMA, write_state, write_tensors
from ffnscope.types import FFNSite

Channels = Mapping[FFNSite, Tensor | Sequence[int]]


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """How a capture runs.

    Attributes:
        batch_size: windows per forward, and per shard file.
        max_bytes: a capture that would take more is refused before it begins.
        overwrite: replace an earlier capture at the same place.
    """

    batch_size: int = 4
    max_bytes: int = 2**30
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}.")


def capture_size(
    model: nn.Module,
    windows: Windows,
    *,
    sites: Sequence[FFNSite] | None = None,
    channels: Channels | None = None,
    gradients: bool = False,
) -> int:
    """Bytes of the arrays that `capture` would write with the same arguments; the model is not run on the windows.

    For experts it is what they take at most, when every token is given to the widest of a layer's captured ones.
    """
    return _bytes(model, windows, _chosen(model, sites, channels), gradients)


def capture(
    model: nn.Module,
    windows: Windows,
    out: Path,
    *,
    sites: Sequence[FFNSite] | None = None,
    channels: Channels | None = None,
    gradients: bool = False,
    options: CaptureOptions | None = None,
) -> Capture:
    """Write h (and g) of every valid token to ``out``, a new folder.

    One safetensors file per batch, ``part-00000.safetensors``, holds ``<site name>/h`` and ``<site name>/g``
    [n, n_channels] in the dtype of the model, and ``token_ids``, ``window`` and ``position`` [n] int64. An expert has
    only the rows of the tokens that are routed to it, and ``<site name>/tokens`` says which these are.
    ``index.json`` is written last, and the folder gets its name when all is there. g is the gradient of the summed
    token NLL, as in `calibrate`; sums over the rows are the statistics.

    Args:
        model: a causal LM; left as it was.
        windows: text; padding is left out.
        out: folder to make.
        sites: FFNs to capture; None takes those of ``channels``, or all.
        channels: site -> indices of its channels, one entry per site; None captures all channels.
        gradients: also run backward and write g.
        options: batch size, limit of bytes, overwriting.

    Raises:
        UsageError: more than ``max_bytes``, no window, or impossible channels.
        NotAvailableError: an FFN that several layers share.
        ArtifactError: ``out`` exists, or cannot be written.
        NonFiniteError: an activation or gradient overflowed; the site is named.
    """
    options = options or CaptureOptions()
    chosen = _chosen(model, sites, channels)
    size = _bytes(model, windows, chosen, gradients)
    if len(windows) == 0:
        raise UsageError("there is no window to capture; give a text of at least one window.")
    if size > options.max_bytes:
        raise UsageError(
            f"this capture would take {size / 2**20:,.1f} MiB ({windows.n_tokens:,} tokens, {len(chosen)} sites); "
            f"max_bytes is {options.max_bytes / 2**20:,.1f} MiB. Capture fewer windows, sites or channels, or raise "
            "max_bytes."
        )
    with new_folder(out, overwrite=options.overwrite) as part:
        names = _write_parts(model, windows, part, chosen, gradients, options.batch_size)
        sizes = {"n_tokens": windows.n_tokens, "bytes": size, "gradients": gradients}
        text = {"windows_hash": windows.hash, "source": windows.source}
        facts = {"kind": KIND, "schema": SCHEMA, **sizes, **text, "parts": names, "sites": _rows(model, chosen)}
        write_state(part / INDEX, facts)
    return read_capture(out)


def _write_parts(
    model: nn.Module,
    windows: Windows,
    folder: Path,
    chosen: Mapping[FFNSite, Tensor | None],
    gradients: bool,
    batch_size: int,
) -> list[str]:
    recorder = _Recorder(model, chosen, gradients)
    names: list[str] = []
    with frozen(model):
        for i, batch in enumerate(windows.batches(batch_size)):
            names.append(f"part-{i:05d}.safetensors")
            tensors = {**recorder.record(batch), **_tokens(batch, i * batch_size)}
            write_tensors(folder / names[-1], tensors, {"kind": "capture part"})
    return names


class _Recorder:
    """Copies the wanted channels of one batch to the CPU."""

    def __init__(self, model: nn.Module, chosen: Mapping[FFNSite, Tensor | None], gradients: bool):
        self.model = model
        self.chosen = chosen
        self.gradients = gradients
        self._tensors: dict[str, Tensor] = {}
        self._rows = TokenRows(torch.ones(0, 0, dtype=torch.bool))
        self._n_tokens = 0

    def record(self, batch: Windows) -> dict[str, Tensor]:
        self._tensors, self._rows = {}, TokenRows(batch.valid)
        sites = list(self.chosen)
        on_gradient = self._on_gradient if self.gradients else None
        observe_batch(self.model, sites, batch, self._on_activation, on_gradient, on_routing=self._rows.route)
        self._add_experts(batch)
        for site in reversed(sites):
            kept = [v for k, v in self._tensors.items() if k in (f"{site.name}/h", f"{site.name}/g")]
            if not all(bool(torch.isfinite(v).all()) for v in kept):
                raise not_finite(self.model, sites, batch, site)
        return self._tensors

    def _add_experts(self, batch: Windows) -> None:
        """Rows of the capture that an expert's rows belong to; no row where no token has reached it."""
        first, names = self._n_tokens, ("h", "g") if self.gradients else ("h",)
        self._n_tokens += batch.n_tokens
        for site, index in self.chosen.items():
            if site.expert is None:
                continue
            self._tensors[f"{site.name}/tokens"] = first + self._rows.captured(site)
            width = site.d_ff if index is None else index.numel()
            for name in names:
                self._tensors.setdefault(f"{site.name}/{name}", torch.empty(0, width, dtype=_dtype(self.model, site)))

    def _on_activation(self, site: FFNSite, h: Tensor) -> None:
        self._tensors[f"{site.name}/h"] = self._copy(site, h)

    def _on_gradient(self, site: FFNSite, h: Tensor, g: Tensor) -> None:
        self._tensors[f"{site.name}/g"] = self._copy(site, g)

    def _copy(self, site: FFNSite, signal: Tensor) -> Tensor:
        rows = self._rows.take(site, signal)
        index = self.chosen[site]
        wanted = rows if index is None else rows.index_select(1, index.to(rows.device))
        return wanted.cpu()


def _chosen(
    model: nn.Module, sites: Sequence[FFNSite] | None, channels: Channels | None
) -> dict[FFNSite, Tensor | None]:
    """Sites and their channel indices (None = all)."""
    if channels is None:
        found = dict.fromkeys(sites if sites is not None else find_sites(model))
        _check_used_once(found)
        return found
    _check_used_once(channels)
    wanted = list(channels) if sites is None else list(sites)
    odd = [s.name for s in {*wanted, *channels} if s not in channels or s not in wanted]
    if odd:
        raise UsageError(f"{odd[0]} is in only one of sites and channels; channels must have one entry per site.")
    return {site: _index(site, channels[site]) for site in wanted}


def _check_used_once(sites: Iterable[FFNSite]) -> None:
    shared = next((site for site in sites if site.n_uses > 1), None)
    if shared is not None:
        raise NotAvailableError(
            f"{shared.name} {reuse(shared)}, so a token has several activations of its "
            "channels, and a capture has one row per token. Capture other sites."
        )


def _index(site: FFNSite, channels: Tensor | Sequence[int]) -> Tensor:
    index = torch.as_tensor(channels, dtype=torch.int64).cpu()
    valid = index.dim() == 1 and index.numel() > 0 and index.unique().numel() == index.numel()
    if not valid or int(index.min()) < 0 or int(index.max()) >= site.d_ff:
        raise UsageError(f"channels of {site.name} must be a non-empty list of different indices in [0, {site.d_ff}).")
    return index


def _bytes(model: nn.Module, windows: Windows, chosen: Mapping[FFNSite, Tensor | None], gradients: bool) -> int:
    per_token = 3 * torch.int64.itemsize
    layers: dict[str, list[int]] = {}  # bytes of one token's row, by the experts that share the tokens
    for site, index in chosen.items():
        width = site.d_ff if index is None else index.numel()
        row = width * _dtype(model, site).itemsize * (2 if gradients else 1)
        layers.setdefault(site.group, []).append(row if site.expert is None else row + torch.int64.itemsize)
    for rows in layers.values():
        # every captured expert where the config does not say how many a token is given to
        per_token += max(rows) * min(experts_per_token(model, default=len(rows)), len(rows))
    return per_token * windows.n_tokens


def _dtype(model: nn.Module, site: FFNSite) -> torch.dtype:
    owner = owner_of(model, site, site.down)
    weight: Any = getattr(owner, site.down.rpartition(".")[2]) if site.stacked else owner.weight
    return weight.dtype


def _rows(model: nn.Module, chosen: Mapping[FFNSite, Tensor | None]) -> list[dict[str, Any]]:
    return [
        {
            "site": asdict(site),
            "channels": None if index is None else index.tolist(),
            "dtype": str(_dtype(model, site)).removeprefix("torch."),
        }
        for site, index in chosen.items()
    ]


def _tokens(batch: Windows, first: int) -> dict[str, Tensor]:
    window, position = batch.valid.nonzero(as_tuple=True)
    return {"token_ids": batch.input_ids[batch.valid], "window": window + first, "position": position}
