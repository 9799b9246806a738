"""Steps of a plan for two devices, told to a reporter: trace, count, plan, simulate; measure where there are two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import hash_json
from ffnscope.run.progress import Reporter
from ffnscope.run.sparse_steps import traced
from ffnscope.sparse.placement.frequency import channel_frequencies
from ffnscope.sparse.placement.machine import Machine, probe_bandwidth
from ffnscope.sparse.placement.parts import split_
from ffnscope.sparse.placement.plan import Placement, Speed, channel_bytes, plan_placement
from ffnscope.sparse.placement.selections import Selections, machine_for, selection_bytes
from ffnscope.sparse.placement.speed import measure, simulate
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import TraceOptions, check_traces
from ffnscope.types import FFNSite

PROMPT = 16
"""Tokens of the prompt after which decoding is measured."""
COUNTED, HELD = "fit", "test"
"""Documents on which channels are counted, and others on which a plan is simulated."""


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes per second that both devices read; None is measured here.

    Attributes:
        fast: of the device of the hot channels.
        slow: of the other one, which is the CPU.
        sync_seconds: see `Machine`.
    """

    fast: float | None
    slow: float | None
    sync_seconds: float

    def check(self) -> None:
        """Raise UsageError for what is impossible, and for a fast device that is neither described nor there."""
        for one in (self.fast, self.slow):
            if one is not None:
                Machine(one, one, self.sync_seconds)
        if self.fast is None and not torch.cuda.is_available():
            raise UsageError(
                "there is no CUDA device here whose bandwidth could be measured. Give --fast-bandwidth, the GB/s that "
                "the device of the hot channels reads, for example 900."
            )

    def machine(self, model: Any, selections: Selections, reporter: Reporter) -> Machine:
        """Measure what is not given."""
        found = {"cuda": self.fast, "cpu": self.slow}
        for device, known in found.items():
            if known is None:
                with reporter.task(f"bandwidth of {device}", "rounds"):
                    found[device] = probe_bandwidth(device)
        fast, slow = found["cuda"], found["cpu"]
        assert fast is not None and slow is not None
        return machine_for(model, selections, fast, slow, self.sync_seconds)


@dataclass(frozen=True, slots=True, eq=False)
class PlannedPlacement:
    """A plan and what is known of its speed.

    Attributes:
        placement: with all of this in its facts.
        hits: site -> share of its selected channels that are hot.
        speeds: simulated and measured, as far as they are to be had.
        why_not: "simulated" or "measured" -> why there is no such speed.
    """

    placement: Placement
    hits: Mapping[FFNSite, float]
    speeds: tuple[Speed, ...]
    why_not: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class PlacementJob:
    """A plan to make.

    Attributes:
        loaded: model and tokenizer, on the CPU.
        selections: of all its FFNs.
        windows: text to count on.
        budget: bytes of the fast device for channels.
        bandwidths: of the devices.
        batch_size: windows per forward.
        new_tokens: to decode where speed is measured.
        facts: kept in the plan.
    """

    loaded: LoadedModel
    selections: Selections
    windows: Windows
    budget: int
    bandwidths: Bandwidths
    batch_size: int
    new_tokens: int
    facts: Mapping[str, Any]

    def check(self) -> None:
        """Refuse what cannot work before any work.

        Raises:
            UsageError: too few documents, traces that are too large, or a fast device that is not known.
            NotAvailableError: an FFN that cannot be traced.
        """
        self.bandwidths.check()
        check_traces(self.loaded.model, self.windows, list(self.selections), self._options)

    def plan(self, folder: Path, reporter: Reporter) -> PlannedPlacement:
        """Trace the text into ``folder``, count, plan, simulate and measure."""
        model = self.loaded.model
        sites = list(self.selections)
        key = hash_json([self.facts["model"], self.windows.hash, self.windows.document.tolist()])
        path = folder / f"traces_{key[:16]}"
        traces = traced(self.loaded, self.windows, path, "the text", reporter, self._options, sites)
        with reporter.task("count channels", "FFNs") as update:
            frequencies = channel_frequencies(traces, self.selections, COUNTED, update)
        machine = self.bandwidths.machine(model, self.selections, reporter)
        sizes = {site: channel_bytes(model, site) for site in sites}
        placement = plan_placement(frequencies, sizes, self.budget, machine)
        hits = {s: _share(one[placement.hot[s]].sum(), one.sum()) for s, one in frequencies.items()}
        found, why_not = dict[str, Speed](), dict[str, str]()
        for name, speed in (("simulated", self._simulated), ("measured", self._measured)):
            try:
                found[name] = speed(placement, traces, reporter)
            except NotAvailableError as error:
                why_not[name] = str(error)
        facts = {**self.facts, "selection_bytes": selection_bytes(self.selections), **why_not_facts(why_not)}
        facts |= {name: asdict(speed) for name, speed in found.items()}
        facts |= {"hits": {site.name: share for site, share in hits.items()}}
        return PlannedPlacement(replace(placement, facts=facts), hits, tuple(found.values()), why_not)

    @property
    def _options(self) -> TraceOptions:
        return TraceOptions(batch_size=self.batch_size)

    def _simulated(self, placement: Placement, traces: Traces, reporter: Reporter) -> Speed:
        return simulate(placement, traces, self.selections, HELD)

    def _measured(self, placement: Placement, traces: Traces, reporter: Reporter) -> Speed:
        if not torch.cuda.is_available():
            raise NotAvailableError("there is no CUDA device here, so no clock was read.")
        held = traces.windows_of(self.windows, HELD)
        with (
            reporter.task("decode on both devices", "tokens"),
            split_(self.loaded.model, placement, self.selections) as model,
        ):
            return measure(model, held.input_ids[:1, :PROMPT], self.new_tokens)


def why_not_facts(why_not: Mapping[str, str]) -> dict[str, str]:
    """Reasons as facts of a plan."""
    return {f"not_{name}": reason for name, reason in why_not.items()}


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0
