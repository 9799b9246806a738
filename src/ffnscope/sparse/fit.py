"""`fit_card`: from traces to a calibrated contextual sparsity, one FFN in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, NotAvailableError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.ffn.heap import give_back_free
from ffnscope.io import hash_json
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import LossChange, SiteCard, Source, SparsityCard
from ffnscope.sparse.card_figures import CardFigures
from ffnscope.sparse.card_options import (
    CAP,
    BytesTarget,
    CardOptions,
    CardTarget,
    CardTexts,
    Ladder,
    ParameterTarget,
    PerplexityTarget,
    ladder_of,
    loss_limit,
    measure_and_value,
)
from ffnscope.sparse.choose import (
    NEEDS_WINDOWS,
    Choice,
    ModelLosses,
    check_certificate,
    choose,
    most_batches,
    selectors_at,
    spread,
)
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.gradients import OutputGradients, output_gradients
from ffnscope.sparse.predictors.interface import OnEpoch
from ffnscope.sparse.rule import SelectionRule, tensors_of
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.site_fit import FittedSite, SiteJob, SiteTokens, fit_site, read_site, write_site
from ffnscope.sparse.site_params import check_names, site_params
from ffnscope.sparse.split import Part
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

OnStep = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done and there in all: FFNs for "fit" and "measure"; batches
for "choose", where the loss of the model decides, and "loss", of the model with the card."""


def fit_card(
    model: nn.Module,
    traces: Traces,
    rule: SelectionRule,
    target: CardTarget,
    *,
    options: CardOptions | None = None,
    texts: CardTexts | None = None,
    on_step: OnStep | None = None,
) -> tuple[SparsityCard, dict[FFNSite, Selector]]:
    """Fit predictors, calibrate the policy to a target, and measure the result on documents that had no part in it.

    Predictors are made from the fit documents. A target is met on the calibration documents, in every FFN by itself; or
    for perplexity, by one density for all of them, the lowest of ``options.settings`` that was measured to be within
    it; for bytes, by the highest one that reads no more. With a certificate, settings are fixed on the fit documents
    and the calibration documents choose among them. The test documents, and a second text, only measure. An FFN that
    would read more bytes than it does dense stays dense, and so does one (an expert) without tokens to fit and
    calibrate with, which is left out of the card.

    Args:
        model: the traced model; left as it was.
        traces: inputs of its FFNs.
        rule: predictor and policy.
        target: what is wanted.
        options: certificate, allocation, files to go on from.
        texts: the traced windows (for perplexity, and its figures), traces of a second text.
        on_step: see `OnStep`.

    Returns:
        The card, and the selections of the FFNs that are not dense, for `wrap_`.

    Raises:
        UsageError: a target that cannot be met, too few documents for a certificate, other windows than were traced.
        ArtifactError: traces of another model.
    """
    options, texts = options or CardOptions(), texts or CardTexts()
    fitting = _Fitting(model, traces, rule, target, options, texts, _Meter(on_step or _silent))
    fitting.check()
    fitted = fitting.fit()
    losses = fitting.losses(fitted, "calibrate")
    n_windows = 0 if losses is None else len(losses.windows)
    fitting.meter.begin("choose", most_batches(len(fitted), fitting.ladder, target, options, n_windows))
    choice = choose(fitted, fitting.ladder, target, options, losses)
    fitting.meter.reach(1.0)
    settings = {s: _unless_dearer(one, choice.settings[s]) for s, one in fitted.items()}
    return fitting.card(fitted, choice, settings), selectors_at(fitted, settings)


def check_readable(rule: SelectionRule, options: CardOptions, sites: Sequence[FFNSite]) -> None:
    """Raise for what a rule cannot be fitted with: allocations, FFNs, and files that it names.

    Raises:
        UsageError: "fisher", whose gradients come with each FFN's own input alone, and a predictor of another input;
            the plan of a core without one of the FFNs.
        NotAvailableError: a prompt, and an FFN that is an expert.
        ArtifactError: a file that is not there.
    """
    rule.identity()
    rule.check_core(site.name for site in sites)
    check_names(rule, sites)
    if options.allocation == "fisher" and (rule.lookahead or rule.prompt):
        what = "looks ahead" if rule.lookahead else "takes its scores from a prompt"
        raise UsageError(
            f"the allocation 'fisher' weighs errors on each FFN's own inputs, and {rule.predictor} {what}; use "
            "'relative_error' or 'measured'."
        )
    expert = next((site for site in sites if site.expert is not None), None)
    if rule.prompt and expert is not None:
        raise NotAvailableError(
            f"{expert.name} is an expert, which does not see the prompt of a window as a whole; griffin is for dense "
            "FFNs. Use another predictor, such as static."
        )


def site_job(rule: SelectionRule, target: CardTarget, options: CardOptions) -> SiteJob:
    """What a card wants of every FFN."""
    certified = options.certify is not None and isinstance(target, Target)
    loss: Any = target.measure if certified and isinstance(target, Target) else None
    damage = options.allocation if options.allocation in ("relative_error", "fisher") else None
    return SiteJob(rule, ladder_of(target, options), options.wanted, loss, damage)


def _unless_dearer(one: FittedSite, setting: int) -> int:
    """Dense where a setting reads as many bytes as that."""
    return setting if one.bytes_read(setting) < one.bytes_dense else 0


def _silent(stage: str, done: int, total: int) -> None:
    return None


@dataclass(slots=True, eq=False)
class _Meter:
    """Counts batches of one stage, and tells them."""

    say: OnStep
    stage: str = ""
    done: int = 0
    total: int = 0

    def begin(self, stage: str, total: int) -> None:
        """Another stage; one of no batch is not told."""
        self.stage, self.done, self.total = stage, 0, total
        self.reach(0.0)

    def batch(self, *_: int) -> None:
        """One more."""
        self.done = min(self.done + 1, self.total)
        self.say(self.stage, self.done, self.total)

    def reach(self, share: float) -> None:
        """So much is done: what was known already is not measured again."""
        if self.total:
            self.done = max(self.done, round(share * self.total))
            self.say(self.stage, self.done, self.total)


@dataclass(slots=True, eq=False)
class _Fitting:
    """One call of `fit_card`."""

    model: nn.Module
    traces: Traces
    rule: SelectionRule
    target: CardTarget
    options: CardOptions
    texts: CardTexts
    meter: _Meter
    known: dict[Part, ModelLosses] = field(default_factory=dict[Part, ModelLosses])
    params: Mapping[FFNSite, Mapping[str, Any]] = field(default_factory=dict[FFNSite, Mapping[str, Any]])

    @property
    def ladder(self) -> Ladder:
        return ladder_of(self.target, self.options)

    @property
    def job(self) -> SiteJob:
        return site_job(self.rule, self.target, self.options)

    def check(self) -> None:
        """Refuse what cannot work before any work."""
        assert self.ladder.values
        facts = self.traces.facts
        if weights_hash(self.model) != facts["weights_hash"]:
            raise ArtifactError(
                f"the traces in {self.traces.path} are of other weights than this {type(self.model).__name__} has. "
                "Load the traced model in the same dtype, or trace again."
            )
        check_readable(self.rule, self.options, self.traces.sites)
        if self.options.certify is not None:
            check_certificate(self.options.certify, self.target, len(self.traces.parts["calibrate"]))
        windows = self.texts.windows
        if windows is not None and windows.hash != facts["windows_hash"]:
            raise UsageError(
                f"the windows of {windows.source} are not those that were traced; give the same windows to trace and "
                "to fit_card, so that documents mean the same in both."
            )
        needs = isinstance(self.target, PerplexityTarget) or self.options.allocation != "uniform"
        if windows is None and needs:
            raise UsageError(NEEDS_WINDOWS)

    def fit(self) -> dict[FFNSite, FittedSite]:
        """All FFNs that have tokens, with all settings."""
        found: dict[FFNSite, FittedSite] = {}
        gradients = self._gradients()
        self.params = site_params(self.rule, self.model, self.traces.sites)
        key = self._key()
        self.meter.say("fit", 0, len(self.traces.sites))
        for done, site in enumerate(self.traces.sites, start=1):
            if all(len(self.traces.tokens(site, part)) for part in ("fit", "calibrate")):
                found[site] = self._site(done - 1, site, key, gradients.get(site))
                give_back_free()
            self.meter.say("fit", done, len(self.traces.sites))
        if not found:
            raise UsageError("no FFN of these traces has tokens to fit and to calibrate with; trace a longer text.")
        return found

    def losses(self, fitted: Mapping[FFNSite, FittedSite], part: Part) -> ModelLosses | None:
        """The loss on the windows of a part of the documents; None where no text was given."""
        windows = self._windows(part)
        if windows is None:
            return None
        if part not in self.known:
            self.known[part] = self._model_losses(fitted, windows)
        return self.known[part]

    def card(
        self, fitted: Mapping[FFNSite, FittedSite], choice: Choice, settings: Mapping[FFNSite, int]
    ) -> SparsityCard:
        """Measure, and write down."""
        measured = CardFigures(self.traces, self.texts.second, self.options.wanted)
        rows: list[SiteCard] = []
        self.meter.say("measure", 0, len(fitted))
        for done, (site, one) in enumerate(fitted.items(), start=1):
            rows.append(measured.site(site, one, settings[site]))
            self.meter.say("measure", done, len(fitted))
        tensors = {
            f"{site.name}/{name}": value
            for site, one in fitted.items()
            if settings[site] or self.rule.trained
            for name, value in tensors_of(one.predictor, one.policy).items()
        }
        return SparsityCard(
            self.rule, self.options.wanted, measure_and_value(self.target), tuple(rows), measured.whole(),
            self._loss(fitted, settings),
            choice.certificate, choice.allocation, tensors, self._facts(fitted),
        )  # fmt: skip

    def _loss(self, fitted: Mapping[FFNSite, FittedSite], settings: Mapping[FFNSite, int]) -> dict[Source, LossChange]:
        """What settings do to the loss on every text that was given."""
        held: dict[Source, ModelLosses | None] = {"calibrate": self.losses(fitted, "calibrate")}
        held["test"] = self.losses(fitted, "test")
        if self.texts.second_windows is not None:
            held["second"] = self._model_losses(fitted, self.texts.second_windows)
        there: dict[Source, ModelLosses] = {source: one for source, one in held.items() if one is not None}
        sizes = [2 * math.ceil(len(one.windows) / one.batch_size) for one in there.values()]
        self.meter.begin("loss", sum(sizes))
        found: dict[Source, LossChange] = {}
        for done, (source, one) in enumerate(there.items(), start=1):
            found[source] = one.change(settings)
            self.meter.reach(sum(sizes[:done]) / sum(sizes))
        return found

    def _model_losses(self, fitted: Mapping[FFNSite, FittedSite], windows: Windows) -> ModelLosses:
        size, prompt = self.options.batch_size, self.rule.prompt
        return ModelLosses(self.model, fitted, windows, size, self.meter.batch, prompt)

    def ffn(self, site: FFNSite) -> FFN:
        return ffn_of(self.model, site, self.traces.activation(site))

    def _site(self, number: int, site: FFNSite, key: str, gradients: OutputGradients | None) -> FittedSite:
        folder, ffn = self.options.checkpoint, self.ffn(site)
        path = None if folder is None else folder / f"site_{number:04d}.safetensors"
        source = self.traces.before(site) if self.rule.lookahead else None
        found = None if path is None else read_site(path, key, ffn, self.rule, source)
        if found is None:
            training = None if path is None else path.with_name(f"training_{number:04d}.safetensors")
            fit, calibrate = (
                self.traces.fit_tokens(site, part, lookahead=0 if source is None else 1)
                for part in ("fit", "calibrate")
            )
            fit = replace(fit, checkpoint=training, on_epoch=self._on_epoch(site))
            found = fit_site(ffn, SiteTokens(fit, calibrate, gradients, source, self.params[site]), self.job)
            if path is not None and training is not None:
                write_site(path, key, found)
                training.unlink(missing_ok=True)
        return found

    def _on_epoch(self, site: FFNSite) -> OnEpoch | None:
        told = self.options.on_epoch
        return None if told is None else lambda done, most, missed: told(site, done, most, missed)

    def _gradients(self) -> Mapping[FFNSite, OutputGradients]:
        windows = self._windows("calibrate")
        if self.options.allocation != "fisher" or windows is None:
            return {}
        return output_gradients(self.model, self.traces.sites, spread(windows, self.options.gradient_windows))

    def _windows(self, part: Part) -> Windows | None:
        if self.texts.windows is None:
            return None
        return self.traces.windows_of(self.texts.windows, part)

    def _key(self) -> str:
        """Hash of all that a fitted FFN depends on."""
        job = asdict(self.job)
        windows = self.options.gradient_windows if self.options.allocation == "fisher" else 0
        return hash_json([job, self.rule.identity(), self.traces.facts["key"], self.traces.facts["seed"], windows])

    def _facts(self, fitted: Mapping[FFNSite, FittedSite]) -> dict[str, Any]:
        traces, second, certify = self.traces, self.texts.second, self.options.certify
        facts: dict[str, Any] = {
            "weights_hash": traces.facts["weights_hash"],
            "windows_hash": traces.facts["windows_hash"],
            "source": traces.facts["source"],
            "documents": {name: len(part) for name, part in traces.parts.items()},
            "seed": traces.facts["seed"],
            "left_out": [site.name for site in traces.sites if site not in fitted],
            "allocation": self.options.allocation,
            "floor": self.options.floor,
            "prompt": self.rule.prompt,
        }
        if second is not None:
            facts["second"] = {"source": second.facts["source"], "windows_hash": second.facts["windows_hash"]}
        if certify is not None and not isinstance(self.target, ParameterTarget | BytesTarget):  # refused before
            facts["certified_loss"] = _LOSS_WORDS[measure_and_value(self.target)[0]]
            facts["limit"] = loss_limit(self.target)
            facts["certify"] = asdict(certify)
        return facts


_LOSS_WORDS = {
    "recall": "1 - recall",
    "missed_mass": "missed mass",
    "relative_error": "relative error, at most 1",
    "perplexity": f"rise of the NLL per token, from 0 to {CAP:g} times the allowed one, over that",
}
