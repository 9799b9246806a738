"""What may run in the place of dense FFNs: masks per token, or dense FFNs that read fewer bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ffnscope.apply.pruned import Pruned, as_pruned, plan_of
from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.costs import GROUP, low_bit_share, matrix_bytes, rank_for, sparse_bytes
from ffnscope.sparse.ffn import check_site, ffn_of
from ffnscope.sparse.masking import Selected, masked_by
from ffnscope.sparse.predictors.low_bit import LowBitMatrix
from ffnscope.sparse.predictors.whitened_svd import truncated, whitening
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

Weights = Mapping[FFNSite, Mapping[str, Tensor]]
"""Site -> "gate", "up", "down" -> new values in the canonical shape (`FFNWeights`)."""
OnSite = Callable[[int, int], None]


class Form(Protocol):
    """Something that runs in the place of the dense FFNs of a model, under a label."""

    @property
    def label(self) -> str:
        """Its name in reports."""
        ...

    @property
    def sites(self) -> Collection[FFNSite]:
        """FFNs that it replaces; the others stay dense."""
        ...

    def applied(self, model: nn.Module, prompt: int) -> AbstractContextManager[Selected | None]:
        """Within the block it runs; the first ``prompt`` tokens of a window are dense where the form is per token."""
        ...

    def bytes_read(self, densities: Mapping[FFNSite, float]) -> float:
        """Bytes that the FFNs of ``sites`` read per token (`ffnscope.sparse.costs`), at measured densities."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MaskedForm:
    """Channels selected per token.

    Attributes:
        label: its name.
        selectors: site -> selector.
    """

    label: str
    selectors: Mapping[FFNSite, Selector]

    @property
    def sites(self) -> Collection[FFNSite]:
        """See `Form`."""
        return self.selectors.keys()

    def applied(self, model: nn.Module, prompt: int) -> AbstractContextManager[Selected | None]:
        """See `Form`."""
        return masked_by(model, self.selectors, prompt)

    def bytes_read(self, densities: Mapping[FFNSite, float]) -> float:
        """See `Form`; an expert that no token has reached counts as dense."""
        return sum(
            sparse_bytes(one.predictor, densities[site]) if site in densities else matrix_bytes(one.predictor.ffn)
            for site, one in self.selectors.items()
        )


@dataclass(frozen=True, slots=True, eq=False)
class WeightsForm:
    """Dense FFNs with other weights: fewer bits, lower rank. Prompts are read by them as well.

    Attributes:
        label: its name.
        weights: what replaces what.
        n_bytes: per token.
    """

    label: str
    weights: Weights
    n_bytes: float

    @property
    def sites(self) -> Collection[FFNSite]:
        """See `Form`."""
        return self.weights.keys()

    def applied(self, model: nn.Module, prompt: int) -> AbstractContextManager[Selected | None]:
        """See `Form`."""
        return weights_replaced(model, self.weights)

    def bytes_read(self, densities: Mapping[FFNSite, float]) -> float:
        """See `Form`."""
        return self.n_bytes


@dataclass(frozen=True, slots=True, eq=False)
class PrunedForm:
    """A plan, perhaps with reconstructed weights: the same channels for every token, prompts included.

    Attributes:
        label: its name.
        pruned: plan or reconstruction.
        n_bytes: per token.
    """

    label: str
    pruned: Pruned
    n_bytes: float

    @property
    def sites(self) -> Collection[FFNSite]:
        """See `Form`."""
        return plan_of(self.pruned).kept.keys()

    def applied(self, model: nn.Module, prompt: int) -> AbstractContextManager[Selected | None]:
        """See `Form`."""
        return _without_counts(as_pruned(model, self.pruned))

    def bytes_read(self, densities: Mapping[FFNSite, float]) -> float:
        """See `Form`."""
        return self.n_bytes


def dense_bytes(model: nn.Module, sites: Sequence[FFNSite] | None = None) -> float:
    """Bytes that the dense FFNs read per token; of experts all, as if every one were asked."""
    chosen = find_sites(model) if sites is None else sites
    return sum(matrix_bytes(FFN(weights_of(model, site), torch.relu)) for site in chosen)


def low_bit_form(
    model: nn.Module, bits: int, *, group: int = GROUP, sites: Sequence[FFNSite] | None = None
) -> WeightsForm:
    """All matrices of the FFNs rounded to a few bits: what sparsity has to beat at the same bytes.

    Rounded to nearest between lowest and highest of each group of inputs, without any calibration, so a better
    quantiser would lose less.

    Args:
        model: in memory.
        bits: 2 to 8 per weight.
        group: inputs per group.
        sites: FFNs; None takes all.

    Raises:
        UsageError: impossible bits or group.
        NotAvailableError: a norm before down, adapters, or an FFN that is used several times.
    """
    if not 2 <= bits <= 8 or group < 2:
        raise UsageError(f"bits must be in [2, 8] and group at least 2; got {bits} and {group}.")
    chosen = list(find_sites(model) if sites is None else sites)
    weights: dict[FFNSite, dict[str, Tensor]] = {}
    for site in chosen:
        check_site(site)
        own = _matrices(model, site)
        weights[site] = {name: LowBitMatrix(value, bits, group).dense for name, value in own.items()}
    label = f"{bits}-bit dense FFN"
    return WeightsForm(label, weights, low_bit_share(bits, group) * dense_bytes(model, chosen))


@torch.no_grad()
def low_rank_form(
    model: nn.Module,
    traces: Traces,
    share: float,
    *,
    sites: Sequence[FFNSite] | None = None,
    on_site: OnSite | None = None,
) -> WeightsForm:
    """All matrices of the FFNs factored to a share of their bytes, each nearest on the inputs that it has in a text.

    Args:
        model: in memory.
        traces: their fitting part gives the inputs; those of down are h of the dense FFN.
        share: of the bytes of the dense FFN.
        sites: FFNs; None takes those of the traces.
        on_site: see `fit_predictors`.

    Raises:
        UsageError: a share that is less than rank 1.
    """
    weights: dict[FFNSite, dict[str, Tensor]] = {}
    chosen = list(traces.sites if sites is None else sites)
    for done, site in enumerate(chosen, 1):
        ffn = ffn_of(model, site, traces.activation(site))
        own = _matrices(model, site)
        rank = rank_for(ffn, share, len(own))
        x = traces.x(site, "fit")
        inputs = {"down": ffn.h(x.to(ffn.weights.up.device))}
        factors = {name: whitening(inputs.get(name, x), value.device) for name, value in own.items() if name != "gate"}
        made = {name: truncated(value, factors.get(name, factors["up"]), rank) for name, value in own.items()}
        weights[site] = {name: one.outer @ one.inner for name, one in made.items()}
        if on_site is not None:
            on_site(done, len(chosen))
    return WeightsForm("whitened low-rank FFN", weights, share * dense_bytes(model, chosen))


def pruned_form(model: nn.Module, label: str, pruned: Pruned) -> PrunedForm:
    """A static plan, or a reconstruction, under a label, with the bytes of what it keeps."""
    kept = plan_of(pruned).kept
    n_bytes = sum(index.numel() / site.d_ff * dense_bytes(model, [site]) for site, index in kept.items())
    return PrunedForm(label, pruned, n_bytes)


@contextlib.contextmanager
@torch.no_grad()
def weights_replaced(model: nn.Module, weights: Weights) -> Generator[None]:
    """Within the block, matrices of FFNs have other values; bit-identical afterwards, also after an exception.

    Raises:
        UsageError: values of another shape.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for site, new in weights.items():
            own = _matrices(model, site)
            for name, value in new.items():
                if own[name].shape != value.shape:
                    raise UsageError(
                        f"{name} of {site.name} is {tuple(own[name].shape)}; got new values {tuple(value.shape)}."
                    )
                saved.append((own[name], own[name].clone()))
                own[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for view, before in reversed(saved):
                view.copy_(before)


def _matrices(model: nn.Module, site: FFNSite) -> dict[str, Tensor]:
    """Views of the matrices of a site by role."""
    own = weights_of(model, site)
    return {n: value for n in ("gate", "up", "down") if (value := getattr(own, n)) is not None}


@contextlib.contextmanager
def _without_counts(inner: AbstractContextManager[object]) -> Generator[None]:
    with inner:
        yield
