"""What contextual sparsity would take: tracing, fitting, measuring; memory from shapes, the fit's time from a probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console

from ffnscope.calibrate.forward import experts_per_token
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import FFNScopeError, UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.offload import materialised
from ffnscope.run.bounds import Load, Workload
from ffnscope.run.lines import Line, print_lines
from ffnscope.run.placement_steps import COUNTED, HELD, PlacementJob
from ffnscope.run.sparse_steps import CardJob
from ffnscope.run.switches import COMMAND, Bounds, print_advice
from ffnscope.sparse.answer_rows import RULES, AnswerOptions, Domain
from ffnscope.sparse.answer_steps import calibrate_rules, measure_rules
from ffnscope.sparse.baselines import BASELINES
from ffnscope.sparse.card import target_words
from ffnscope.sparse.card_curve import n_forms
from ffnscope.sparse.card_options import measure_and_value
from ffnscope.sparse.choose import most_batches
from ffnscope.sparse.fit import site_job
from ffnscope.sparse.predictors.interface import CHUNK
from ffnscope.sparse.probe import FitTime, fit_time, predictor_bytes, probe_fit
from ffnscope.sparse.rivals import LOW_BIT, LOW_RANK
from ffnscope.sparse.rule import TRAINED
from ffnscope.sparse.site_fit import HELD_BYTES, HELD_VALUES
from ffnscope.sparse.split import PARTS, Part, split_documents
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import traces_size
from ffnscope.types import FFNSite

_SELECTED = 2.0
"""Forwards that a forward with selections takes: the scores are made beside the dense FFN."""


def held_bytes(loaded: LoadedModel, sites: Sequence[FFNSite], texts: Sequence[Windows], together: int = 1) -> int:
    """Memory beside the model: hidden states and inputs of one block, or inputs and scores of one FFN.

    ``together``: texts whose inputs one predictor is made from.
    """
    item = next(iter(loaded.model.parameters())).element_size()
    tokens = max(text.n_tokens for text in texts)
    width, channels = max(s.d_model for s in sites), max(s.d_ff for s in sites)
    tracing = tokens * width * (item + 4)
    scores = (min(tokens * channels, HELD_VALUES) + 4 * CHUNK * channels) * HELD_BYTES
    return max(tracing, together * tokens * width * 4 + scores)


def probe_card(job: CardJob) -> FitTime | None:
    """A short probe of the fits of a card; None where so little text cannot meet its target."""
    try:
        return probe_fit(job.loaded.model, job.windows, job.sites, job.rule, job.target, job.options)
    except FFNScopeError:
        return None


def card_work(job: CardJob, probed: FitTime | None) -> Workload:
    """What the making of a card runs on; its predictors stay until the end."""
    text = Load(job.windows.input_ids.numel(), job.windows.length, job.options.batch_size)
    held = max(held_bytes(job.loaded, job.sites, job.texts), _copied_bytes(job)) + _predictors(job.sites, probed)
    return Workload(text, contextual=held, only=("contextual",))


def _copied_bytes(job: CardJob) -> int:
    """Dense FFNs of fewer bytes in a curve: their weights, and those that they stand in for."""
    if not job.densities or not any(label in LOW_BIT or label == LOW_RANK for label in job.against):
        return 0
    item = next(iter(job.loaded.model.parameters())).element_size()
    return 2 * item * sum((2 if s.gate is None else 3) * s.d_model * s.d_ff for s in job.sites)


def card_lines(job: CardJob, probed: FitTime | None, speed: float) -> list[Line]:
    """Tell the steps of a card; ``speed`` in seconds per token of a forward."""
    labels = zip(("", " of a second text"), job.texts, strict=False)
    found = [_trace_line("trace", job.loaded, job.sites, text, speed, label) for label, text in labels]
    parts = {part: _part(job.windows, part, job.seed) for part in ("calibrate", "test")}
    wanted = target_words(*measure_and_value(job.target))
    what = f"{job.rule.predictor} and calibrate {job.rule.policy} to {wanted} in {len(job.sites)} FFNs"
    found.append(
        Line("fit and measure", what, _seconds(probed, len(job.sites), _rows(job.loaded, job.sites, job.texts)))
    )
    ladder = site_job(job.rule, job.target, job.options).ladder
    batches = most_batches(len(job.sites), ladder, job.target, job.options, len(parts["calibrate"]))
    if batches:
        tokens = batches * job.options.batch_size * job.windows.length
        what = f"up to {batches:,} batches, {tokens:,} tokens forward: the loss of the model decides"
        found.append(Line("choose", what, _SELECTED * tokens * speed))
    tokens = sum(one.n_tokens for one in (*parts.values(), *job.texts[1:]))
    found.append(Line("loss", f"the dense model and the card x {tokens:,} tokens", (1 + _SELECTED) * tokens * speed))
    if job.densities:
        models, tokens = n_forms(job.densities, job.against), parts["test"].n_tokens
        what = f"{models} models x {tokens:,} tokens: {len(job.densities)} densities"
        trained = [one for one in job.against if one in BASELINES and BASELINES[one].predictor in TRAINED]
        what += f"; training the predictors of {', '.join(trained)} comes on top" if trained else ""
        found.append(Line("curve", what, _SELECTED * models * tokens * speed))
    return found


def probe_answer(
    loaded: LoadedModel, sites: Sequence[FFNSite], texts: Sequence[Windows], options: AnswerOptions
) -> FitTime | None:
    """A short probe of all rules in one FFN (of experts, those that are given enough tokens); None if there is none."""
    layer = [site for site in sites if site.group == sites[0].group]

    def fit(traces: Sequence[Traces]) -> tuple[int, int]:
        some = [s for s in layer if all(len(one.tokens(s, part)) for one in traces for part in PARTS)]
        if not some:
            raise UsageError("no FFN of the first layer is given tokens of all parts of so little text.")
        domains = {f"text {i}": Domain(one) for i, one in enumerate(traces)}
        with materialised(loaded.model, *some):
            rules = calibrate_rules(loaded.model, domains, some, options, None)
            measure_rules(domains, rules, options, None)
        sizes = [predictor_bytes(one) for one in rules.predictors.values()]
        return sum(len(one.tokens(site)) for one in traces for site in some), max(sizes)

    try:
        return fit_time(loaded.model, texts, layer, fit)
    except FFNScopeError:
        return None


def answer_lines(
    loaded: LoadedModel,
    sites: Sequence[FFNSite],
    texts: Mapping[str, tuple[Windows, Windows]],
    probed: FitTime | None,
    speed: float,
) -> list[Line]:
    """Tell the steps of an answer; ``texts``: name -> windows to calibrate on, and held-out ones."""
    read = [one for one, _ in texts.values()]
    found = [_trace_line("trace", loaded, sites, text, speed) for text in read]
    what = f"{len(RULES)} rules x {len(texts)} texts in {len(sites)} FFNs"
    layers = len({site.group for site in sites})
    found.append(Line("calibrate and measure", what, _seconds(probed, layers, _rows(loaded, sites, read))))
    tokens = sum(held.n_tokens for _, held in texts.values())
    what = f"the dense model and {len(RULES)} rules x {tokens:,} tokens"
    return [*found, Line("perplexity", what, (1 + _SELECTED * len(RULES)) * tokens * speed)]


def answer_work(
    loaded: LoadedModel, sites: Sequence[FFNSite], read: Sequence[Windows], probed: FitTime | None, batch_size: int
) -> Workload:
    """What an answer runs on; predictors, and what is measured of every token and FFN, stay until the end."""
    values = len(RULES) * (2 * (len(read) + 1) + 4)
    kept = 8 * values * len(sites) * sum(_part(text, "test").n_tokens for text in read)
    held = held_bytes(loaded, sites, read, together=len(read)) + kept + _predictors(sites, probed)
    longest = max(read, key=lambda one: one.input_ids.numel())
    text = Load(longest.input_ids.numel(), longest.length, batch_size)
    return Workload(text, contextual=held, only=("contextual",))


def print_sparse_estimate(command: str, lines: Sequence[Line], bounds: Bounds, console: Console) -> None:
    """Print what a command would do, and whether it fits into memory."""
    print_lines(lines, command, console)
    print_advice(bounds, COMMAND, console)


def placement_lines(job: PlacementJob, speed: float) -> list[Line]:
    """Tell the steps of a placement; channels are selected by one of three matrices, or less."""
    sites = list(job.selections)
    found = [_trace_line("trace", job.loaded, sites, job.windows, speed)]
    tokens = sum(_part(job.windows, part).n_tokens for part in (COUNTED, HELD))
    found.append(Line("count and simulate", f"what {tokens:,} tokens select", tokens * speed))
    channels = f"{sum(s.d_ff for s in sites):,} channels of {len(sites)} FFNs"
    found.append(Line("plan", f"{job.budget:,} bytes for {channels}"))
    if torch.cuda.is_available():
        found.append(Line("measure", f"{job.new_tokens} tokens decoded on both devices"))
    return found


def placement_work(job: PlacementJob) -> Workload:
    """What a placement runs on."""
    text = Load(job.windows.input_ids.numel(), job.windows.length, job.batch_size)
    return Workload(text, contextual=held_bytes(job.loaded, list(job.selections), [job.windows]), only=("contextual",))


def _trace_line(
    step: str, loaded: LoadedModel, sites: Sequence[FFNSite], text: Windows, speed: float, label: str = ""
) -> Line:
    size, documents = traces_size(loaded.model, text, sites) / 2**30, len(text.document.unique())
    what = f"{text.n_tokens:,} tokens{label}, {documents} documents: {text.source}; {size:.2f} GiB of disk, "
    return Line(step, f"{what}removed at the end", text.n_tokens * speed)


def _part(windows: Windows, part: Part, seed: int = 0) -> Windows:
    """The windows that begin in documents of one part."""
    return windows[torch.isin(windows.document, split_documents(windows.document, seed)[part])]


def _rows(loaded: LoadedModel, sites: Sequence[FFNSite], texts: Sequence[Windows]) -> int:
    """Tokens that FFNs are given, of all FFNs together: an expert those that are routed to it."""
    layers: dict[str, int] = {}
    for site in sites:
        layers[site.group] = layers.get(site.group, 0) + 1
    each = sum(min(n, experts_per_token(loaded.model, default=n)) for n in layers.values())
    return each * sum(text.n_tokens for text in texts)


def _seconds(probed: FitTime | None, n_fits: int, rows: int) -> float:
    """Seconds of all fits; NaN without a probe."""
    return math.nan if probed is None else probed.of(n_fits, rows)


def _predictors(sites: Sequence[FFNSite], probed: FitTime | None) -> int:
    """Bytes of the predictors of all FFNs; without a probe as of copies of their first two matrices in float32."""
    if probed is not None:
        return len(sites) * probed.predictor_bytes
    return sum(2 * 4 * site.d_model * site.d_ff for site in sites)
