"""Decode with the channels that a selector asks for: FFNs of a model are replaced, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnscope.errors import UsageError
from ffnscope.ffn.projection import modules_of, uses_of, weights_of
from ffnscope.ffn.survey import LeftOut, describe
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.kernels.break_even import MARGIN, RowTimes
from ffnscope.sparse.kernels.ffn import RowWeights
from ffnscope.sparse.kernels.rows import RowMatrix, why_not_compiled
from ffnscope.sparse.monitor import Monitor, MonitorOptions, Watched
from ffnscope.sparse.refusals import check_selectors
from ffnscope.sparse.selector import HandsOn
from ffnscope.sparse.shared_experts import ExpertUse, SharedExperts
from ffnscope.sparse.timing import decoding_time, reading_times, shape_key
from ffnscope.sparse.trial import differs, kinds_of, reached
from ffnscope.sparse.uses import Counts, Level, ModuleUse, ProjectionUse, Selection, Selector, Step, projection_rows
from ffnscope.types import FFNSite

MOST_TOKENS = 16
"""Largest batch whose FFNs read rows; more tokens than that run dense under their masks."""
ACTIVATION_NAMES = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh"), "gelu_tanh"),
    "relu": "relu",
    "relu2": "relu_squared",
}
"""Activations as configs name them -> as the kernels do. Whether they are what a module computes is tried out."""
_KEY = "_ffnscope_runtime"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one FFN did while decoding.

    Attributes:
        tokens: that were decoded.
        density: mean share of the channels that were selected for a token.
        union: mean share of the channels that any token of a step selected; of one sequence, the density.
        read: mean share of the channels that a step read: the union, or all of them where it ran dense under the mask.
        sparse_steps: share of the steps that read only selected channels; the others ran dense under the mask.
    """

    tokens: int
    density: float
    union: float
    read: float
    sparse_steps: float


class Runtime:
    """A model that decodes with selected channels, as `wrap_` leaves it.

    Attributes:
        levels: how each FFN runs: "module" (one kernel), "projections" (one kernel per projection), or "masked".
        copied_bytes: memory of weights that had to be copied to lie row by row, down projections above all.
        monitor: of a model that was wrapped by a card; else None.
    """

    def __init__(self, model: nn.Module, selectors: Mapping[FFNSite, Selector], limit: float | None, step: Step):
        self.levels: dict[FFNSite, Level] = {}
        self.copied_bytes = 0
        self.monitor: Monitor | None = None
        self._model, self._step = model, step
        self._given_limit = limit
        self._selections = {s: Selection(s, rule, step, self._limit_of(s)) for s, rule in selectors.items()}
        self._uses: dict[FFNSite, list[ModuleUse | ProjectionUse | ExpertUse]] = {}
        self._experts: dict[str, SharedExperts] = {}
        self._rows: dict[tuple[FFNSite, Level], Any] = {}
        self._handles = [m.register_forward_pre_hook(self._note, with_kwargs=True) for m in _entrances(model)]

    def measured(self) -> dict[FFNSite, Measured]:
        """What happened since the model was wrapped, for every FFN that has decoded a token."""
        counts = {site: selection.counts for site, selection in self._selections.items()}
        return {site: _measured(site, c) for site, c in counts.items() if c.tokens}

    def put(self, site: FFNSite, level: Level, selector: Selector | None = None) -> None:
        """Let an FFN run at a level; with a ``selector`` for a trial, which reads rows whatever that costs."""
        selection = self._selections[site]
        if selector is not None:
            selection = Selection(site, selector, self._step, lambda n_tokens: 1.0)
        self._uses[site] = [self._use(use, level, selection) for use in uses_of(site)]

    def remove(self, site: FFNSite) -> None:
        """Put the FFN back as it was."""
        for use in self._uses.pop(site, []):
            use.undo()

    def close(self) -> None:
        """Put everything back as it was, and give back the memory of the rows."""
        for site in list(self._uses):
            self.remove(site)
        self._rows.clear()  # the runtime is in cycles, which wait for a collection
        for handle in self._handles:
            handle.remove()

    def keep(self, site: FFNSite, level: Level) -> None:
        """Settle on a level."""
        self.put(site, level)
        self.levels[site] = level
        held = self._rows.get((site, level))
        for matrix in _matrices(held):
            self.copied_bytes += matrix.copied_bytes

    def leave(self, site: FFNSite) -> None:
        """Let an FFN run dense, without selecting."""
        self._drop(site)
        del self._selections[site]

    def follow(self, selectors: Mapping[FFNSite, Selector]) -> None:
        """Select by these from now on; FFNs without one run dense."""
        for site in [s for s in self._selections if s not in selectors]:
            self.leave(site)
        for site, selector in selectors.items():
            self._selections[site].selector = selector
            if isinstance(selector, HandsOn) and self.levels[site] != "masked":  # needs no rows
                self._drop(site)
                self.keep(site, "masked")

    def slower(self, watched: Mapping[FFNSite, Watched]) -> list[FFNSite]:
        """FFNs for which selecting for a token, and reading the density of the card, takes longer than dense."""
        return [site for site, one in watched.items() if not self._pays(site, one, watched)]

    def _pays(self, site: FFNSite, selector: Watched, watched: Mapping[FFNSite, Watched]) -> bool:
        density = selector.card.density
        if density > self._limit_of(site)(1):  # dense under the mask
            return False
        timed = {s: (self._first(s), watched[s]) for s in self._alike(site) if s in watched}
        with torch.no_grad():
            return decoding_time(self._model, timed, selector) <= MARGIN

    def drop_rows(self) -> None:
        """Forget matrices of levels that no FFN runs at."""
        self._rows = {key: held for key, held in self._rows.items() if self.levels.get(key[0]) == key[1]}

    def _drop(self, site: FFNSite) -> None:
        """Put the FFN back, and forget its rows."""
        self.remove(site)
        for matrix in _matrices(self._rows.pop((site, self.levels.pop(site)), None)):
            self.copied_bytes -= matrix.copied_bytes

    def _use(self, use: FFNSite, level: Level, selection: Selection) -> ModuleUse | ProjectionUse | ExpertUse:
        site, model = selection.site, self._model
        if site.stacked:
            return ExpertUse(model, use, selection, self._experts)
        if level == "masked":
            return ProjectionUse(model, use, selection, None)
        if (site, level) not in self._rows:
            made = RowWeights.of(weights_of(model, site)) if level == "module" else projection_rows(model, site)
            self._rows[site, level] = made
        held = self._rows[site, level]
        if level == "module":
            return ModuleUse(model, use, selection, held, ACTIVATION_NAMES[site.activation])
        return ProjectionUse(model, use, selection, held)

    def _limit_of(self, site: FFNSite) -> Callable[[int], float]:
        known: dict[tuple[int, int], float] = {}

        def limit(n_tokens: int) -> float:
            if self.levels.get(site, "masked") == "masked":
                return -1.0  # not even no channel at all is read by rows
            if self._given_limit is not None:
                return self._given_limit
            if n_tokens > MOST_TOKENS:
                return 0.0
            key = (n_tokens, torch.get_num_threads())
            if key not in known:  # asked at every step
                known[key] = self._row_times(site, n_tokens).limit
            return known[key]

        return limit

    def _alike(self, site: FFNSite) -> list[FFNSite]:
        """The FFNs that run as a site does, itself first."""
        own = (self.levels[site], shape_key(site))
        return [site, *(s for s, level in self.levels.items() if (level, shape_key(s)) == own and s != site)]

    def _first(self, site: FFNSite) -> ModuleUse | ProjectionUse:
        use = self._uses[site][0]
        assert not isinstance(use, ExpertUse), "no rows are read of it"
        return use

    def _row_times(self, site: FFNSite, n_tokens: int) -> RowTimes:
        uses = {s: self._first(s) for s in self._alike(site)}
        with torch.no_grad():
            return reading_times(self._model, uses, self.levels[site], n_tokens)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        self._step.length = ids.shape[-1] if ids is not None else 0 if embeds is None else embeds.shape[-2]
        if self.monitor is not None:
            self.monitor.check()


def wrap_(
    model: nn.Module,
    selectors: Mapping[FFNSite, Selector] | SparsityCard,
    *,
    prefill: bool = False,
    break_even: float | None = None,
    monitor: MonitorOptions | None = None,
    never_slower: bool | None = None,
) -> Runtime:
    """Let FFNs compute only the channels that selectors ask for while the model decodes, in place.

    Works with the model's forward and ``generate``; parameters, names and state_dict stay as they are. A step with one
    new token per sequence is decoding; all else is prefill and runs dense. In a batch, the union of the channels of its
    tokens is read, and each token has its own. The output is that of the model with h multiplied by the mask, whatever
    runs: where reading rows would not be faster (too dense, more than 16 tokens, gradients), or cannot be done, FFNs
    run dense under the mask. Each kind of FFN is tried out on one token first.

    Compiled kernels round less than bfloat16 modules do, so texts may differ there. Weights must not change, and the
    model not be copied, while it is wrapped; `unwrap_` it before.

    Args:
        model: a `transformers` causal LM in memory, in evaluation mode.
        selectors: site -> function of x [T, d_model] that gives the mask [T, d_ff] of bool, True = keep; or a card,
            with which decoding is watched too: an FFN runs dense while it is outside of the card's bands (`Monitor`).
        prefill: also apply the masks where many tokens are read at once, without reading less: to measure quality.
        break_even: largest density at which rows are read, in [0, 1]; None measures it once per shape, on first use.
        monitor: how decoding by a card is watched.
        never_slower: leave FFNs dense, without their predictors, for which selecting and reading at the density of the
            card is measured, once per shape, dtype and kind of predictor, to take longer. Nothing is missed there, but
            the text may depend on the machine. None: with a card, unless ``break_even`` is given.

    Returns:
        The runtime, which tells how each FFN runs and what was measured.

    Warns:
        which FFNs run dense under the mask, dense, or with torch instead of compiled kernels, and why.

    Raises:
        ArtifactError: the card is of another model.
        UsageError: no selectors or something else, sites of another model, a model that is wrapped already, a
            ``break_even`` outside [0, 1], or ``never_slower`` or ``monitor`` without a card, which they need.
        NonFiniteError: an FFN puts out NaN or infinity.
        NotAvailableError: without a card, a predictor that looks ahead.
        ModelError: weights are offloaded.
    """
    watch = None
    if isinstance(selectors, SparsityCard):
        watch = Monitor(selectors, selectors.selectors(model), monitor)
        selectors = watch.selectors
    else:
        _check_without_card(monitor, never_slower)
    _check(model, selectors, break_even)
    runtime = Runtime(model, selectors, break_even, Step(prefill=prefill))
    masked = _settle(model, runtime, selectors)
    if watch is not None and (break_even is None if never_slower is None else never_slower):
        masked = _leave_slower(model, runtime, watch, masked)
    runtime.monitor = watch
    vars(model)[_KEY] = runtime
    _warn(model, runtime, masked)
    return runtime


def unwrap_(model: nn.Module) -> nn.Module:
    """Put back the FFNs that `wrap_` replaced; returns the model, as it was.

    Raises:
        UsageError: the model is not wrapped.
    """
    runtime: Runtime | None = vars(model).pop(_KEY, None)
    if runtime is None:
        raise UsageError(f"{type(model).__name__} is not wrapped, so there is nothing to put back.")
    runtime.close()
    return model


def _check_without_card(monitor: MonitorOptions | None, never_slower: bool | None) -> None:
    if never_slower:
        raise UsageError("never_slower needs the densities of a card; without one, choose the FFNs by their speed.")
    if monitor is not None:
        raise UsageError("monitor needs the bands of a card; give a card instead of selectors, or no monitor.")


def _check(model: nn.Module, selectors: Mapping[FFNSite, Selector], limit: float | None) -> None:
    if _KEY in vars(model):
        raise UsageError(f"{type(model).__name__} is wrapped already; call unwrap_(model) first.")
    if limit is not None and not 0 <= limit <= 1:
        raise UsageError(f"break_even must be a density in [0, 1]; got {limit:g}.")
    check_selectors(model, selectors)


def _settle(model: nn.Module, runtime: Runtime, selectors: Mapping[FFNSite, Selector]) -> list[LeftOut]:
    """Let every FFN run at its fastest level; returns those that run under the mask, and why."""
    masked: list[LeftOut] = []
    try:
        for kind in kinds_of(list(selectors)):
            level, why = _level(model, runtime, kind)
            for site in kind:
                hands_on = isinstance(selectors[site], HandsOn)
                runtime.keep(site, "masked" if hands_on else level)
                if why is not None and not hands_on:
                    masked.append(LeftOut(site.name, why))
    except BaseException:
        runtime.close()
        raise
    runtime.drop_rows()
    return masked


def _leave_slower(model: nn.Module, runtime: Runtime, watch: Monitor, masked: Sequence[LeftOut]) -> list[LeftOut]:
    """Leave FFNs dense that would be slower, and warn which, and why; returns what runs under the mask still."""
    try:
        slow = runtime.slower(watch.watched)
    except BaseException:
        runtime.close()
        raise
    watch.leave(slow)
    runtime.follow(watch.selectors)
    reasons = {one.path: one.reason for one in masked}
    if slow:
        why = "selecting channels and reading them takes longer"
        left = [LeftOut(site.name, reasons.get(site.name, why)) for site in slow]
        warnings.warn(
            f"left dense in {type(model).__name__}, which is faster: {describe(left)}. To select there all the same, "
            "set never_slower=False.",
            stacklevel=3,
        )
    names = {site.name for site in slow}
    return [one for one in masked if one.path not in names]


def _level(model: nn.Module, runtime: Runtime, kind: Sequence[FFNSite]) -> tuple[Level, str | None]:
    """The fastest level at which FFNs compute what the mask defines; for "masked" also why no other does."""
    if kind[0].stacked:
        return "masked", "experts that share parameters have no module of their own that could be given fewer channels"
    site = reached(model, kind)
    if site is None:
        return "masked", "the token of the trial is routed to none of these experts"
    if site.norm is not None:
        return "masked", "a norm before down reads all its channels"
    if site.adapters:
        return "masked", "adapters of its uses add to all its channels"
    levels: list[Level] = ["projections"]
    if site.activation in ACTIVATION_NAMES and _is_whole_module(model, site):
        levels.insert(0, "module")
    for level in levels:
        if not differs(model, runtime, site, level):
            return level, None
    return "masked", "its code names its width, so it cannot be given fewer channels"


def _is_whole_module(model: nn.Module, site: FFNSite) -> bool:
    """Whether the parameters of the module of a site are those of its projections."""
    own = {id(p) for name in modules_of(site) for p in model.get_submodule(name).parameters()}
    return bool(site.path) and {id(p) for p in model.get_submodule(site.path).parameters()} <= own


def _warn(model: nn.Module, runtime: Runtime, masked: Sequence[LeftOut]) -> None:
    if masked:
        warnings.warn(f"dense under the mask in {type(model).__name__}: {describe(masked)}.", stacklevel=3)
    found = [LeftOut(s.name, w) for s, at in runtime.levels.items() if at != "masked" if (w := _slow(model, s))]
    if found:
        warnings.warn(f"rows are copied by torch in {type(model).__name__}: {describe(found)}.", stacklevel=3)


def _slow(model: nn.Module, site: FFNSite) -> str | None:
    return why_not_compiled(weights_of(model, site).up)


def _entrances(model: Any) -> list[nn.Module]:
    base = getattr(model, "base_model", model)
    return [model] if base is model else [model, base]


def _matrices(held: Any) -> list[RowMatrix]:
    found = list(held.values()) if isinstance(held, dict) else [] if held is None else [held.gate, held.up, held.down]
    return [m for m in found if m is not None]


def _measured(site: FFNSite, counts: Counts) -> Measured:
    n_selected = counts.selected / (counts.tokens * site.d_ff)
    union, read, sparse = (total / counts.steps for total in (counts.union, counts.read, counts.sparse))
    return Measured(counts.tokens, n_selected, union, read, sparse)
