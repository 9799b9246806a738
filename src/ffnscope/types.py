"""The nouns of ffnscope: frozen values that stages hand to each other. Invariants are checked when one is made."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ffnscope.budget import Budget
from ffnscope.display import frame, html_table
from ffnscope.errors import NonFiniteError, UsageError

Reduction = Literal["sum", "max"]
Fused = Literal["gate_up", "up_gate", "interleaved"]
Storage = Literal["linear", "transposed", "flat", "modules"]
Role = Literal["ffn", "attention", "cut", "unembedding"]
"""What is observed: an FFN, or another part of the model that reads or writes the residual stream."""


@dataclass(frozen=True, slots=True)
class FFNSite:
    """One FFN of one layer: where it is and how wide it is.

    Attributes:
        layer: index of the decoder layer.
        path: module path of the nearest module that contains all projections.
        gate: module path of the gate projection relative to ``path``, or None for a plain two-matrix FFN.
        up: module path of the up projection relative to ``path``; equal to ``gate`` when ``fused`` is set.
        down: module path of the down projection relative to ``path``.
        d_model: width of the residual stream.
        d_ff: number of channels.
        activation: name of the activation function as the config tells it, or "unknown".
        fused: order of the halves when one projection holds gate and up ("interleaved" = gate, up, gate, up, ...),
            else None.
        expert: index of the expert, or None for a dense FFN. Where all experts of a layer share their parameters,
            ``path`` is the module that is given the tokens, and gate, up and down name parameters instead of modules.
        storage: how an expert lies in those parameters: "linear" [n_experts, out, in], "transposed" [n_experts, in,
            out], or "flat" [n_experts * d_ff, d_model]; or "modules" for an expert that is a module of its own, built
            like a dense FFN. A dense FFN is "linear", whatever its modules do.
        norm: module path, relative to ``path``, of an RMS norm before the down projection, which is given h; or None.
        adapters: module paths of low-rank matrices whose outputs are added to those of ``gate`` or ``up``.
        twins: paths of the modules of other layers that hold the same parameters: one FFN that is used several times.
        runs: how often one forward runs each of these modules; more than once in a model that repeats its layers.
    """

    layer: int
    path: str
    gate: str | None
    up: str
    down: str
    d_model: int
    d_ff: int
    activation: str = "unknown"
    fused: Fused | None = None
    expert: int | None = None
    storage: Storage = "linear"
    norm: str | None = None
    adapters: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    runs: int = 1

    def __post_init__(self) -> None:
        for name in ("adapters", "twins"):  # a file gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.d_model < 1 or self.d_ff < 1:
            raise UsageError(f"{self.path}: d_model and d_ff must be positive; got {self.d_model} and {self.d_ff}.")
        if (self.fused is not None) != (self.gate is not None and self.gate == self.up):
            raise UsageError(f"{self.path}: 'fused' must be set exactly when gate and up are one projection.")

    @property
    def name(self) -> str:
        """Unique name of the site, used as key in every file."""
        return f"{self.path.removesuffix('.experts')}.experts.{self.expert}" if self.stacked else self.path

    @property
    def stacked(self) -> bool:
        """Whether this is an expert whose weights lie in parameters that all experts of its layer share."""
        return self.expert is not None and self.storage != "modules"

    @property
    def n_uses(self) -> int:
        """How many activations of its channels a token has in one forward."""
        return self.runs * (1 + len(self.twins))

    @property
    def group(self) -> str:
        """What the experts of a layer have in common: the module with their parameters, or the list of modules."""
        return self.path if self.stacked or self.expert is None else self.path.rpartition(".")[0]

    @property
    def role(self) -> Role:
        """What it is."""
        return "ffn"

    @property
    def projections(self) -> tuple[str, ...]:
        """Full paths of the distinct projections, gate first: modules, or parameters for an expert."""
        names = dict.fromkeys(n for n in (self.gate, self.up, self.down) if n is not None)
        return tuple(f"{self.path}.{n}" if self.path else n for n in names)


@dataclass(frozen=True, slots=True)
class ObservedSite(FFNSite):
    """Another part of the model that is observed for its graph, described like an FFN; never scored, never cut.

    * "attention": ``up`` makes the values and ``down`` is the output projection; the d_ff channels are what it reads.
    * "cut": the residual stream before a step; ``down`` (and ``up``) is the module that reads it, d_ff = d_model.
    * "unembedding": ``down`` (and ``up``) is the LM head; its d_ff = d_model channels are the normed final stream.

    Attributes:
        kind: which of these.
    """

    kind: Role = "cut"

    @property
    def role(self) -> Role:
        """What it is."""
        return self.kind

    @property
    def name(self) -> str:
        """Unique name, used as key in every file: the observed module and the role."""
        return f"{self.path}.{self.down}#{self.kind}" if self.path else f"{self.down}#{self.kind}"


def check_core(site: FFNSite, core: Tensor) -> None:
    """Raise UsageError unless ``core`` holds indices of one or more distinct channels of the site."""
    if core.dtype != torch.int64 or core.dim() != 1 or core.numel() < 1:
        raise UsageError(
            f"core of {site.name}: expected a one-dimensional, non-empty int64 index; got {core.dtype} "
            f"{tuple(core.shape)}."
        )
    if int(core.min()) < 0 or int(core.max()) >= site.d_ff or core.unique().numel() != core.numel():
        raise UsageError(
            f"core of {site.name}: channels must be unique and in [0, {site.d_ff}); got {core.numel()} from "
            f"{int(core.min())} to {int(core.max())}."
        )


@dataclass(frozen=True, slots=True, eq=False)
class FFNWeights:
    """Canonical views of one site's weights: ``gate``/``up`` are [d_ff, d_model], ``down`` is [d_model, d_ff].

    ``gate`` is None for a plain FFN; biases are [d_ff], [d_ff] and [d_model] or None. Views, not copies: a change in
    place changes the model, but for a ``down`` into which the weight of a norm before it is multiplied.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        d_ff, d_model = self.up.shape
        if self.down.shape != (d_model, d_ff) or (self.gate is not None and self.gate.shape != (d_ff, d_model)):
            gate = None if self.gate is None else tuple(self.gate.shape)
            raise UsageError(
                f"FFN weights disagree: gate {gate}, up {tuple(self.up.shape)}, down {tuple(self.down.shape)}; "
                "expected [d_ff, d_model], [d_ff, d_model], [d_model, d_ff]."
            )


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStats:
    """Sums and maxima over calibration tokens for one site.

    Attributes:
        site: the FFN that was observed.
        values: statistic name -> tensor, [d_ff] unless the statistic declares another shape.
        counts: statistic name -> number of tokens that its sum is divided by (``mean``).
        reductions: statistic name -> how two parts are joined.
    """

    site: FFNSite
    values: Mapping[str, Tensor]
    counts: Mapping[str, int]
    reductions: Mapping[str, Reduction]

    def __post_init__(self) -> None:
        if not (self.values.keys() == self.counts.keys() == self.reductions.keys()):
            raise UsageError(f"{self.site.name}: values, counts and reductions must name the same statistics.")

    @property
    def n_tokens(self) -> int:
        """Largest number of tokens that any statistic has seen."""
        return max(self.counts.values(), default=0)

    def total(self, name: str) -> Tensor:
        """Sum (or maximum) of a statistic; raises when this calibration did not collect it."""
        if name not in self.values:
            found = ", ".join(sorted(self.values)) or "none"
            raise UsageError(
                f"statistic {name!r} was not collected for {self.site.name} (collected: {found}). "
                f"Calibrate again and ask for a metric that needs it."
            )
        return self.values[name]

    def mean(self, name: str) -> Tensor:
        """Sum of a statistic divided by the tokens counted for it; a maximum has no mean."""
        total = self.total(name)
        if self.reductions[name] != "sum":
            raise UsageError(f"statistic {name!r} is a maximum over tokens, which has no mean; use total().")
        if self.counts[name] < 1:
            raise UsageError(f"{self.site.name}: statistic {name!r} has seen no token, so it has no mean.")
        return total / self.counts[name]

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Join two disjoint parts of a calibration; exact, whatever the split."""
        if other.site != self.site or other.reductions != self.reductions:
            raise UsageError(f"cannot merge statistics of {self.site.name} with those of {other.site.name}.")
        values = {k: self._joined(k, v, other) for k, v in self.values.items()}
        return ChannelStats(
            self.site, values, {k: n + other.counts[k] for k, n in self.counts.items()}, self.reductions
        )

    def _joined(self, name: str, value: Tensor, other: ChannelStats) -> Tensor:
        if self.reductions[name] == "sum":
            return value + other.values[name]
        if self.counts[name] == 0 or other.counts[name] == 0:  # a maximum over nothing is none
            return value if self.counts[name] else other.values[name]
        return torch.maximum(value, other.values[name])


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One finite value per channel of every site; high = keep.

    Attributes:
        metric: name of the metric.
        values: site -> [d_ff].
        facts: how it was made (parameters, calibration, hashes); written beside the scores.
    """

    metric: str
    values: Mapping[FFNSite, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for site, value in self.values.items():
            if value.shape != (site.d_ff,):
                raise UsageError(
                    f"metric {self.metric!r} returned shape {tuple(value.shape)} for {site.name}; "
                    f"expected ({site.d_ff},) = (d_ff,)."
                )
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise NonFiniteError(
                    f"metric {self.metric!r} is NaN or infinite for {bad} of {site.d_ff} channels of {site.name}."
                )

    @property
    def sites(self) -> tuple[FFNSite, ...]:
        """Sites in the order of the model."""
        return tuple(self.values)

    def to_pandas(self) -> Any:
        """One row per channel: site, layer, channel, score."""
        rows = {
            "site": [s.name for s in self.values for _ in range(s.d_ff)],
            "layer": [s.layer for s in self.values for _ in range(s.d_ff)],
            "channel": [c for s in self.values for c in range(s.d_ff)],
            "score": [float(v) for value in self.values.values() for v in value],
        }
        return frame(rows)

    def _repr_html_(self) -> str:
        """Summary per site, for notebooks."""
        rows = {
            "site": [s.name for s in self.values],
            "channels": [s.d_ff for s in self.values],
            "mean": [float(v.double().mean()) for v in self.values.values()],
            "max": [float(v.max()) for v in self.values.values()],
            "best channel": [int(v.argmax()) for v in self.values.values()],
        }
        return f"<p><b>{html.escape(self.metric)}</b>: high = keep</p>{html_table(rows)}"


@dataclass(frozen=True, slots=True, eq=False)
class PruningPlan:
    """Which channels stay. Data, not action: save it, diff it, edit it, apply it later.

    Attributes:
        kept: site -> sorted indices of kept channels (int64).
        metric: metric that ranked the channels.
        allocator: allocator that chose the widths.
        budget: what was asked.
        protected: site -> indices that were kept whatever their score.
        provenance: scores, calibration and model that it came from.
    """

    kept: Mapping[FFNSite, Tensor]
    metric: str
    allocator: str
    budget: Budget
    protected: Mapping[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for site, index in self.kept.items():
            if index.dtype != torch.int64 or index.dim() != 1 or index.numel() < 1:
                raise UsageError(f"plan for {site.name}: expected a one-dimensional, non-empty int64 index.")
            if int(index[0]) < 0 or int(index[-1]) >= site.d_ff or bool((index[1:] <= index[:-1]).any()):
                raise UsageError(
                    f"plan for {site.name}: kept channels must be unique, sorted and in [0, {site.d_ff}); "
                    f"got {index.numel()} from {int(index.min())} to {int(index.max())}."
                )

    @property
    def widths(self) -> dict[FFNSite, int]:
        """Number of kept channels per site."""
        return {site: index.numel() for site, index in self.kept.items()}

    @property
    def sparsity(self) -> float:
        """Achieved sparsity: removed channels over all channels of the plan's sites."""
        total = sum(site.d_ff for site in self.kept)
        return (total - sum(self.widths.values())) / total if total else 0.0

    def removed(self, site: FFNSite) -> Tensor:
        """Sorted indices of the removed channels of one site."""
        return self.mask(site).logical_not().nonzero().flatten()

    def to_pandas(self) -> Any:
        """One row per site: site, layer, d_ff, kept width, sparsity, number of protected channels."""
        return frame(self._rows())

    def _repr_html_(self) -> str:
        """Widths per site, for notebooks."""
        what = f"{self.metric}, {self.allocator}: sparsity {self.sparsity:.4f} (asked {self.budget.sparsity:g})"
        return f"<p><b>{html.escape(what)}</b></p>{html_table(self._rows())}"

    def _rows(self) -> dict[str, list[Any]]:
        return {
            "site": [s.name for s in self.kept],
            "layer": [s.layer for s in self.kept],
            "d_ff": [s.d_ff for s in self.kept],
            "kept": [k.numel() for k in self.kept.values()],
            "sparsity": [1 - k.numel() / s.d_ff for s, k in self.kept.items()],
            "protected": [self.protected[s].numel() if s in self.protected else 0 for s in self.kept],
        }

    def mask(self, site: FFNSite) -> Tensor:
        """Boolean mask [d_ff] of one site, True = keep."""
        mask = torch.zeros(site.d_ff, dtype=torch.bool)
        mask[self.kept[site]] = True
        return mask


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One measured number. There are no stand-in values: an evaluation that fails raises.

    Attributes:
        name: what was measured, e.g. "perplexity".
        value: the number.
        unit: its unit, e.g. "1" or "nats/token".
        stderr: standard error over independent pieces (blocks), or None where it is not defined.
        n: number of tokens (or items) behind it.
        dataset: text that it was measured on.
        protocol: how, in one line.
        seed: seed of any random choice, or None.
    """

    name: str
    value: float
    unit: str
    stderr: float | None
    n: int
    dataset: str
    protocol: str
    seed: int | None = None
