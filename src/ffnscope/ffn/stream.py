"""How FFNs and attentions read and write the residual stream of a model, found by what is computed.

In one forward over a few texts of a single token, every projection puts out random numbers (`stream_probe`). Attention
over one token passes its values on, so an output projection reads exactly the random numbers of the projection that
makes the values, some of them for several heads. A norm is told by its output being what a projection reads. Branches
that read the same stream belong to one step; what two neighbouring cuts differ by must be what the branches between put
out, each times a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import LayoutError, NotAvailableError, UsageError
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.projection import in_width, out_width, reuse
from ffnscope.ffn.stream_probe import TEXTS, Call, Seen, around, last_norm, norm_weight, observe_stream, same
from ffnscope.types import FFNSite, ObservedSite

EXACT = 0.05
"""Share of a change of the stream that may be left unexplained: rounding in bfloat16."""


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A branch of the stream.

    Attributes:
        site: an FFN, an expert, or an attention.
        norm: weight [d_model] of the norm before it, or None without a norm.
        out_norm: weight [d_model] of the norm of what it puts out, or None.
        gain: number that its output (after that norm) is multiplied by before it is added to the stream.
        sources: for an attention, the row of the value projection that each channel reads, [d_ff]; else None.
    """

    site: FFNSite
    norm: Tensor | None = None
    out_norm: Tensor | None = None
    gain: float = 1.0
    sources: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """The residual stream of a model.

    Attributes:
        steps: branches between each cut and the next.
        cuts: the stream before each step and after the last; None where it could not be found.
        unembedding: the LM head, or None.
        head_norm: weight [d_model] of the norm before it, or None.
        missing: what was not found, by name and with the consequence.
    """

    steps: tuple[tuple[Reader, ...], ...]
    cuts: tuple[ObservedSite | None, ...]
    unembedding: ObservedSite | None
    head_norm: Tensor | None
    missing: tuple[str, ...]

    @property
    def observed(self) -> list[ObservedSite]:
        """Everything to observe beside FFNs, in the order of the model."""
        found: list[ObservedSite | None] = []
        for cut, step in zip(self.cuts, (*self.steps, ()), strict=True):
            found += [cut, *(one.site for one in step if isinstance(one.site, ObservedSite))]
        return [site for site in (*found, self.unembedding) if site is not None]


@dataclass(slots=True)
class _Branch:
    """A branch as it was seen.

    ``stream`` is what its norm was given (``read`` without a norm) at ``cut``, ``read`` what itself was given at
    ``behind``, ``written`` what it put out, behind its norm there; None for an expert.
    """

    site: FFNSite
    cut: ObservedSite
    stream: Tensor
    when: int
    norm: Tensor | None
    written: Tensor | None
    out_norm: Tensor | None
    sources: Tensor | None
    read: Tensor
    behind: ObservedSite


def find_stream(model: nn.Module, sites: Sequence[FFNSite]) -> Stream:
    """Find the steps of the residual stream that hold ``sites``; the model is run once and left as it was.

    An attention that is not recognised (its output projection does not read a projection's values as they are, as with
    an output gate or a latent) is left out and named in ``missing``: the stream is then taken to skip it.

    Raises:
        UsageError: no site.
        LayoutError: a site does not read the stream of this model.
        NotAvailableError: an FFN with a norm before its down projection, or that several layers share.
    """
    if not sites:
        raise UsageError("a graph needs at least one FFN site; find_sites(model) lists those of a model.")
    _check_plain(sites)
    seen = observe_stream(model, sites)
    missing: list[str] = []
    branches = [_ffn(seen, site) for site in sites]
    branches += _attentions(model, seen, sites, missing)
    branches.sort(key=lambda b: b.when)
    steps = _grouped(branches)
    head = _unembedding(model, seen, sites[0].d_model, missing)
    after = [step[0].stream for step in steps[1:]] + [head.stream if head else None]
    settled = [_settled(step, stream, missing) for step, stream in zip(steps, after, strict=True)]
    cuts = (*(cut for cut, _ in settled), head.cut if head else None)
    unembedding, norm = (head.site, head.norm) if head else (None, None)
    return Stream(tuple(readers for _, readers in settled), cuts, unembedding, norm, tuple(missing))


def _check_plain(sites: Sequence[FFNSite]) -> None:
    """Raise unless every FFN is one branch, and multiplies its channels with fixed numbers."""
    odd = next((s for s in sites if s.norm is not None or s.adapters or s.n_uses > 1), None)
    if odd is None:
        return
    why = (
        f"{reuse(odd)}, so it is no single branch of the stream"
        if odd.n_uses > 1
        else "has adapters, whose share in its channels is not in the weights of gate and up"
        if odd.adapters
        else f"has a norm before its down projection ({odd.norm}), so what a channel writes depends on all others"
    )
    raise NotAvailableError(f"{odd.name} {why}; metrics of scope 'model' cannot rank it. Choose another metric.")


def _ffn(seen: Seen, site: FFNSite) -> _Branch:
    if site.expert is not None:
        fits = [n for n in around(site) if n in seen.experts and seen.experts[n].x.shape == (TEXTS, site.d_model)]
        module, written = fits[0] if fits else site.path, None
        call = seen.experts.get(module)
    else:
        module = f"{site.path}.{site.up}" if site.path else site.up
        down = f"{site.path}.{site.down}" if site.path else site.down
        call = seen.projections.get(module)
        written = seen.projections[down].y if down in seen.projections else None
    if call is None or call.x.shape != (TEXTS, site.d_model):
        raise LayoutError(
            f"{site.name} was not seen to read the residual stream: expected rows of {site.d_model} channels for "
            f"{TEXTS} texts of one token, found {None if call is None else tuple(call.x.shape)}. Metrics of scope "
            "'model' cannot rank it; choose other sites or another metric."
        )
    return _branch(seen, site, module, call, written, None)


def _branch(
    seen: Seen, site: FFNSite, module: str, call: Call, written: Tensor | None, sources: Tensor | None
) -> _Branch:
    """Look for the norm before and the norm after."""
    norm = last_norm(seen, output=call.x, before=call.when)
    out = None if written is None else last_norm(seen, source=written)
    cut = _cut(site.layer, module if norm is None else norm, site.d_model)
    stream = call.x if norm is None else seen.norms[norm].x
    added = written if out is None else seen.norms[out].y
    weights = [None if name is None else norm_weight(seen.norms[name]) for name in (norm, out)]
    behind = _cut(site.layer, module, site.d_model)
    return _Branch(site, cut, stream, call.when, weights[0], added, weights[1], sources, call.x, behind)


def _cut(layer: int, module: str, d_model: int) -> ObservedSite:
    path, _, leaf = module.rpartition(".")
    return ObservedSite(layer, path, None, leaf, leaf, d_model, d_model, kind="cut")


def _attentions(model: nn.Module, seen: Seen, sites: Sequence[FFNSite], missing: list[str]) -> list[_Branch]:
    """Attentions of all layers; a layer without one is named."""
    layers = dict.fromkeys(layer for layer in map(layer_path, seen.projections) if layer is not None)
    ffn = {path for site in sites if not site.stacked for path in site.projections}
    width = sites[0].d_model
    found: list[_Branch] = []
    for layer in layers:
        names = [n for n in seen.projections if n.startswith(f"{layer}.") and n not in ffn]
        pairs = [
            (v, o, rows) for o in names for v in names if v != o and (rows := _passed_on(model, seen, (v, o), width))
        ]
        for value, output, rows in pairs:
            index = torch.tensor(rows)
            found.append(_attention(model, seen, (value, output), index))
        if not pairs and names:
            missing.append(
                f"{layer}: no attention was found whose output projection reads the values of a projection of the "
                "stream as they are; it is left out, and the stream skips it"
            )
    return found


def _attention(model: nn.Module, seen: Seen, names: tuple[str, str], sources: Tensor) -> _Branch:
    value, output = names
    layer = int((layer_path(value) or "0").rpartition(".")[2])
    parts = [value.split("."), output.split(".")]
    shared = next((i for i, (a, b) in enumerate(zip(*parts, strict=False)) if a != b), 0)
    path, up, down = ".".join(parts[0][:shared]), *(".".join(p[shared:]) for p in parts)
    o = model.get_submodule(output)
    site = ObservedSite(layer, path, None, up, down, out_width(o), in_width(o), "attention", kind="attention")
    return _branch(seen, site, value, seen.projections[value], seen.projections[output].y, sources)


def _passed_on(model: nn.Module, seen: Seen, names: tuple[str, str], width: int) -> list[int] | None:
    """Row of the first projection that each channel of the second reads unchanged, or None."""
    value, output = names
    made, read = seen.projections[value], seen.projections[output].x
    v, o = model.get_submodule(value), model.get_submodule(output)
    if in_width(v) != width or out_width(o) != width or len(read) != len(made.y):
        return None
    if not bool((made.y == read[:, :1]).all(0).any()):
        return None
    places = {tuple(column): i for i, column in enumerate(made.y.T.float().tolist())}
    exact = [places.get(tuple(column)) for column in read.T.float().tolist()]
    return None if any(place is None for place in exact) else [place for place in exact if place is not None]


def _grouped(branches: Sequence[_Branch]) -> list[list[_Branch]]:
    """Branches that read the same stream are one step."""
    steps: list[list[_Branch]] = []
    for branch in branches:
        home = next((s for s in steps if same(s[0].stream, branch.stream)), None)
        if home is None:
            steps.append([branch])
        else:
            home.append(branch)
    return steps


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """The LM head, and the cut that it or the norm before it reads, with what was seen there."""

    site: ObservedSite
    cut: ObservedSite
    stream: Tensor
    norm: Tensor | None


def _unembedding(model: Any, seen: Seen, d_model: int, missing: list[str]) -> _Head | None:
    module = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is module), None)
    call = None if name is None else seen.projections.get(name)
    if name is None or call is None or call.x.shape[-1] != d_model:
        missing.append("unembedding: no LM head reads the residual stream; its channels count equally")
        return None
    path, _, leaf = name.rpartition(".")
    site = ObservedSite(0, path, None, leaf, leaf, d_model, d_model, kind="unembedding")
    norm = last_norm(seen, output=call.x, before=call.when)
    if norm is None:
        return _Head(site, _cut(0, name, d_model), call.x, None)
    return _Head(site, _cut(0, norm, d_model), seen.norms[norm].x, norm_weight(seen.norms[norm]))


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """What branches must be multiplied by to give the change between two cuts, and the share that is left over."""

    gains: list[float]
    left: float


def _fit(step: Sequence[_Branch], before: Tensor, after: Tensor) -> _Fit | None:
    """None when the output of a branch is not known."""
    written = [b.written for b in step if b.written is not None and b.written.shape == before.shape]
    if len(written) < len(step) or before.shape != after.shape:
        return None
    columns = torch.stack([w.flatten() for w in written], 1)
    change = (after - before).flatten()
    gains = torch.linalg.lstsq(columns, change[:, None]).solution.flatten()
    left = (change - columns @ gains).norm() / change.norm().clamp_min(1e-30)
    return _Fit(gains.abs().tolist(), float(left))


def _settled(step: list[_Branch], after: Tensor | None, missing: list[str]) -> tuple[ObservedSite, tuple[Reader, ...]]:
    """The cut before a step, and its branches with the numbers that their outputs are multiplied by.

    Where the norm stands on the stream itself (as after each block of a post-norm model), what it gives is the stream.
    """
    first = step[0]
    cut, norms, fit = first.cut, [b.norm for b in step], None
    if after is not None:
        fit = _fit(step, first.stream, after)
        inside = _fit(step, first.read, after) if len(step) == 1 else None
        if fit and inside and inside.left < EXACT <= fit.left:
            cut, norms, fit = first.behind, [None], inside
    if fit is not None and fit.left >= EXACT:
        names = ", ".join(b.site.name for b in step)
        missing.append(f"{names}: {fit.left:.0%} of the change of the stream there is not the output of these")
    gains = fit.gains if fit is not None and fit.left < EXACT else [1.0] * len(step)
    readers = (Reader(b.site, n, b.out_norm, g, b.sources) for b, n, g in zip(step, norms, gains, strict=True))
    return cut, tuple(readers)
