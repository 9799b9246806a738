"""What can be registered: statistics, metrics, allocators, predictors and policies, and what they may read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ffnscope.errors import UsageError, unknown_name
from ffnscope.types import FFNSite, Reduction, Role

SIGNALS = ("x", "h", "y", "dy", "g")
"""What a statistic may read, in the order in which one batch brings it."""
NEXT = ("next_h", "next_q")
"""What a statistic may read of the FFN of the next layer: its h in the forward, its q = h g in the backward."""
MARKS = ("core", "document", "target", "window")
"""What a statistic may read that is no signal of the model."""
ORDER = ("x", "h", "y", "next_h", "next_q", "dy", "g")
"""All signals that a site may be shown, in the order in which one batch brings them."""
GRADIENTS = ("next_q", "dy", "g")
"""The signals that need a backward."""
SIZES = ("d_ff", "d_model", "core", "next", "document")
"""Names that the shape of a statistic may use for a number."""
Scope = Literal["site", "model"]
"""What a metric sees at once: one site, or all of them as a graph."""
INPUTS: dict[Scope, tuple[str, ...]] = {"site": ("core", "reference"), "model": ("background",)}
"""What a metric may get beyond statistics and weights."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """A sum or maximum over tokens: ``fn(*signals) -> tensor``.

    ``reads`` names the signals in the order of ``fn``'s arguments, each over the n counted tokens of a batch: ``x`` FFN
    input [n, d_model], ``h`` channel activations [n, d_ff], ``y`` FFN output [n, d_model], ``dy`` and ``g`` the
    gradients of the summed token NLL with respect to y and h; and ``core``, the indices of the site's supernode core,
    which must be known before the pass. ``next_h`` and ``next_q`` [n, next] are h and h g of the FFN of the next layer;
    what reads them is not taken where there is no such FFN, or more than one (experts). ``document`` [n] is the group
    of documents that a token belongs to, ``window`` [n] its window's place in the batch, ``target`` [n] whether it
    predicts a token that counts in the loss. ``shape`` says how large the result is, in numbers or d_ff, d_model, core,
    next (d_ff of the next FFN), document (groups).
    Along an axis ``core`` each entry belongs to one core channel alone, so that a part of the core has a part of the
    result. ``every`` = k reads only each k-th token of a window. A statistic that reads a gradient is divided by the
    number of predicted tokens. ``in_place``: ``fn(total, *signals)`` adds to its float64 sum of that shape itself,
    which for a matrix is cheaper than a new one for each batch. ``counts`` is the same for whole numbers, in int32.
    ``at`` names the roles of the sites where it is taken: FFNs, unless it serves the graph of the whole decoder.
    """

    name: str
    fn: Callable[..., Any]
    reads: tuple[str, ...]
    reduce: Reduction
    shape: tuple[int | str, ...]
    every: int
    summary: str
    counts: bool = False
    in_place: bool = False
    at: tuple[Role, ...] = ("ffn",)

    def __post_init__(self) -> None:
        for role in self.at:
            if role not in get_args(Role):
                raise unknown_name(f"role of statistic {self.name!r}", role, get_args(Role))
        for read in self.reads:
            if read not in (*ORDER, *MARKS):
                raise unknown_name(f"signal of statistic {self.name!r}", read, (*ORDER, *MARKS))
        for size in self.shape:
            if isinstance(size, str) and size not in SIZES:
                raise unknown_name(f"size of statistic {self.name!r}", size, SIZES)
        if not set(self.reads) & set(SIGNALS):
            names = ", ".join(SIGNALS)
            raise UsageError(f"statistic {self.name!r} reads no signal; it must read one or more of {names}.")
        for size, reads in (("core", ("core",)), ("document", ("document",)), ("next", NEXT)):
            if size in self.shape and not {*reads} & {*self.reads}:
                raise UsageError(f"statistic {self.name!r} has a shape with {size!r} but does not read {reads[0]!r}.")
        if self.every < 1:
            raise UsageError(f"statistic {self.name!r}: every must be at least 1 (all tokens); got {self.every}.")
        if self.adds and self.reduce != "sum":
            how = "counts" if self.counts else "adds in place"
            raise UsageError(f"statistic {self.name!r} {how}, so parts are summed; got reduce={self.reduce!r}.")

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass is needed."""
        return bool({*GRADIENTS} & {*self.reads})

    @property
    def needs_core(self) -> bool:
        """Whether the supernode core must be known before the pass."""
        return "core" in self.reads

    @property
    def reads_next(self) -> bool:
        """Whether it is about an FFN and the one of the next layer."""
        return bool({*NEXT} & {*self.reads})

    @property
    def beyond_ffns(self) -> bool:
        """Whether it is also taken outside FFNs."""
        return self.at != ("ffn",)

    @property
    def adds(self) -> bool:
        """Whether ``fn`` adds to its sum itself, instead of returning what is added."""
        return self.counts or self.in_place

    @property
    def itemsize(self) -> int:
        """Bytes per number of its sum."""
        return 4 if self.counts else 8

    def sizes(self, site: FFNSite, core_size: int, n_documents: int = 0, n_next: int = 0) -> tuple[int, ...]:
        """Shape of the result at a site with ``core_size`` core channels, and ``n_next`` channels in the next FFN."""
        known = {"d_ff": site.d_ff, "d_model": site.d_model}
        known |= {"core": core_size, "document": n_documents, "next": n_next}
        return tuple(n if isinstance(n, int) else known[n] for n in self.shape)


@dataclass(frozen=True, slots=True)
class Metric:
    """A scoring rule, high = keep.

    Of ``scope`` "site", ``fn(stats, weights, **params) -> [d_ff]`` scores the channels of one site from its
    `ChannelStats` and `FFNWeights`. Of scope "model", ``fn(graph, stats, **params) -> {site: [d_ff]}`` scores all sites
    at once from a `DecoderGraph`, whose weights are read when they are asked for, and the statistics of all sites.

    ``inputs`` names what it gets beyond statistics and weights, as keyword arguments: ``core`` (indices of the site's
    supernode core) or ``reference`` (FFNWeights of a reference checkpoint) for scope "site"; ``background`` (statistics
    of all sites on another text, or None) for scope "model". ``needs`` may be a function of the parameters. ``check``
    is called with the given parameters before anything is computed; it raises UsageError for values that cannot be.
    """

    name: str
    fn: Callable[..., Any]
    needs: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]
    source: str
    natural_sign: Literal[1, -1]
    family: str
    summary: str
    inputs: tuple[str, ...] = ()
    scope: Scope = "site"
    check: Callable[..., object] | None = None

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise unknown_name(f"scope of metric {self.name!r}", self.scope, get_args(Scope))
        for name in self.inputs:
            if name not in INPUTS[self.scope]:
                raise unknown_name(f"input of metric {self.name!r}", name, INPUTS[self.scope])
            argument = inspect.signature(self.fn).parameters.get(name)
            if argument is None or argument.kind is not argument.KEYWORD_ONLY:
                raise UsageError(
                    f"metric {self.name!r} asks for the input {name!r}, but its function has no keyword-only argument "
                    f"of that name: write def {self.name}(stats, weights, *, {name})."
                )

    @property
    def params(self) -> dict[str, inspect.Parameter]:
        """Typed keyword-only parameters of the metric."""
        found = inspect.signature(self.fn).parameters.items()
        return {k: p for k, p in found if p.kind is inspect.Parameter.KEYWORD_ONLY and k not in self.inputs}

    def needed(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the statistics that the metric needs with these parameters; raises UsageError for wrong values."""
        if self.check is not None:
            self.check(**params)
        return self.needs(params) if callable(self.needs) else self.needs


@dataclass(frozen=True, slots=True)
class Allocator:
    """A rule that decides the kept width of every site: ``fn(scores, budget) -> {site: width}``.

    One that is written ``fn(scores, budget, *, curves)`` is also given measured loss curves.
    """

    name: str
    fn: Callable[..., Any]
    summary: str

    @property
    def needs_curves(self) -> bool:
        """Whether it reads measured loss curves."""
        return "curves" in inspect.signature(self.fn).parameters


@dataclass(frozen=True, slots=True)
class Factory:
    """What makes a predictor, ``make(ffn, fit, **params)``, or a policy, ``make(**params)``; see `ffnscope.sparse`.

    Attributes:
        name: in the registry.
        make: the function or class.
        source: where it was published.
        summary: its first line.
        options: dataclass whose fields ``make`` takes as further keyword arguments; or None.
    """

    name: str
    make: Callable[..., Any]
    source: str
    summary: str
    options: type | None = None

    @property
    def params(self) -> dict[str, inspect.Parameter]:
        """Typed parameters by name: keyword-only ones of a predictor, all of a policy."""
        found = dict(inspect.signature(self.make).parameters)
        if self.options is not None:
            found |= inspect.signature(self.options).parameters
        return {k: p for k, p in found.items() if k not in ("ffn", "fit") and p.kind is not p.VAR_KEYWORD}
