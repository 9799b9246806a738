"""The long steps of the command prune; each leaves what it found in a folder, from which the same call goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.memory import CalibrationBytes, calibration_bytes
from ffnscope.analyze.question import Question
from ffnscope.apply.held_out import FitStatistics, Statistics, collect_held_out, held_out_windows
from ffnscope.apply.method import Method, reconstruct_plan
from ffnscope.apply.new_bias import check_bias
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.reconstruction import read_reconstruction
from ffnscope.apply.record import PruningRecord
from ffnscope.apply.rounds import RoundSteps, plan_in_rounds, read_round
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, scoring_facts
from ffnscope.cli.prune_texts import Sample
from ffnscope.evaluate.compare import EvalRow
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import hash_json, plan_to_dict, read_state, write_stats
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.report.tables import print_results
from ffnscope.run.defaults import defaults_of, enough_windows
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import (
    announce,
    announce_training,
    compare_with_dense,
    discard_damaged,
    keep_reconstruction,
    tell_few_tokens,
)
from ffnscope.scoring import naming_weights
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

Protected = Mapping[FFNSite, Tensor]
READERS = {"h_outer": "obs", "act_sum": "activation_variance"}
"""Statistic of a reconstruction -> a metric that reads it and little else, by whose name it is asked for."""
KEPT = ("h_outer",)
"""Statistics that another cut may want."""


@dataclass(eq=False)
class PruneJob:
    """What is pruned by what.

    Attributes:
        loaded: the dense model.
        method: see `Method`.
        text: to calibrate on.
        inputs: the metric with what it needs; None where a plan or scores are given.
        reporter: told what is done.
        record: of the earlier result that is cut again, in the place of a calibration.
        keeps: whether statistics stay beside the result, with those of a one-shot reconstruction.
    """

    loaded: LoadedModel
    method: Method
    text: Sample
    inputs: opt.Inputs | None
    reporter: Reporter
    record: PruningRecord | None = None
    keeps: bool = False

    @cached_property
    def asked(self) -> Question:
        """What is scored; no metric where a plan or scores are given."""
        model = self.loaded.model
        return Question(model, find_sites(model), {}) if self.inputs is None else self.inputs.question(self.loaded)

    @cached_property
    def windows(self) -> Windows:
        """The calibration text."""
        if self.record is not None and self.record.text is not None:
            return self.record.text.windows(self.loaded.tokenizer)
        enough = enough_windows(self.loaded.model, self.asked.sites, self.text.length) if self.text.grows else None
        return self.text.windows(self.loaded, enough)

    @cached_property
    def model_hash(self) -> str:
        """Hash of the dense weights; of a large model it takes long, so it is found once."""
        return weights_hash(self.loaded.model)

    @property
    def hashes(self) -> dict[str, str]:
        """What the model and the calibration text are, if it is read."""
        found = {"the model": self.model_hash}
        return {**found, "the calibration text": self.windows.hash} if self.reads_text else found

    @property
    def params(self) -> dict[str, Any]:
        """Metrics whose statistics the pass collects."""
        if self.record is not None:
            return dict(self.asked.params)
        names = dict.fromkeys((*self.method.statistics, *self.method.curve_statistics, *(KEPT if self.keeps else ())))
        return {**self.asked.params, **{READERS[name]: {} for name in names if READERS[name] not in self.asked.params}}

    def options(self, part: Path | None = None) -> PassOptions:
        """Sizes of the pass."""
        backward = defaults_of(self.method.reconstruct).backward
        checkpoint = part / "calibrate.safetensors" if part else None
        size = self.text.batch_size
        known = self.model_hash if part else None
        return PassOptions(size, backward, checkpoint=checkpoint, keep_checkpoint=True, model_hash=known)

    def memory(self) -> CalibrationBytes:
        """What the pass takes."""
        given: Any = {"sites": self.asked.sites, "rule": self.asked.rule, "options": self.options()}
        return calibration_bytes(self.loaded.model, self.windows, self.params, **given)

    def check_sites(self, plan: PruningPlan | None, scores: Scores | None) -> None:
        """Raise NotAvailableError when an FFN of a plan, of scores or of the model cannot be reconstructed."""
        given = plan.kept if plan is not None else scores.values if scores is not None else None
        sites = self.asked.sites if given is None else list(given)
        self.method.check_sites(sites)
        if self.method.reconstruct == "bias":
            check_bias(self.loaded.model, sites)

    def check_text(self) -> None:
        """Cut the calibration text, if it is read, and refuse one that does not fit; say where a refit lacks text."""
        if not self.reads_text:
            return
        self.method.check_windows(len(self.windows))
        tell_few_tokens(self.reporter, self.loaded.model, self.method, self.asked.sites, self.windows)

    def plan(
        self, scores: Scores, budget: Budget, protected: Protected, part: Path, curves: Curves | None = None
    ) -> PruningPlan:
        """Choose what stays, by curves or in the rounds of the method."""
        if self.method.rounds == 1:
            return build_plan(scores, budget, self.method.allocator, protected=protected, curves=curves)

        def again(number: int) -> Scores:
            self.reporter.say(f"round {number} of {self.method.rounds}")
            return self.score(part / f"round_{number}", dense=False)

        steps = RoundSteps(again, lambda plan: self.reconstruct(plan, part, self.method.untrained), part, protected)
        for path in part.glob("round_*.json"):
            discard_damaged(self.reporter, path, read_round)
        return plan_in_rounds(self.loaded.model, scores, budget, self.method, steps)

    def score(self, part: Path, *, dense: bool = True) -> Scores:
        """Calibrate and score, the dense model or what rounds have left of it."""
        stats, core = self._calibrate(part, dense=dense)
        facts = scoring_facts(self.loaded, self.model_hash, self.asked, self.windows, self.text.batch_size)
        with self.reporter.task("score", "metrics"):
            (found,) = self.asked.scores(stats, core, facts).values()
        return found

    def reconstruct(self, plan: PruningPlan, part: Path, method: Method | None = None) -> Pruned:
        """Reconstruct a plan as the job's method says, or another; or take what an earlier call left."""
        method = method or self.method
        if method.reconstruct == "none":
            return plan
        known = [self.model_hash, plan_to_dict(plan), self.windows.hash, asdict(method), self.n_held_out]
        path = part / f"reconstruction_{hash_json([*known, self.text.batch_size])[:16]}.safetensors"
        discard_damaged(self.reporter, path, read_reconstruction)
        if path.exists():
            return read_reconstruction(path)
        stats = self.fit_statistics(part) if method.statistics else None
        size, known = self.text.batch_size, self.model_hash
        options = SequentialOptions(batch_size=size, checkpoint=part / "blocks", model_hash=known)
        name = f"reconstruct ({method.reconstruct.replace('_', '-')})"
        announce_training(self.reporter, self.loaded.model, method, plan, self.windows)
        make = partial(reconstruct_plan, self.loaded.model, plan, method, windows=self.windows, stats=stats)
        return keep_reconstruction(self.reporter, name, path, options, make, method.steps)

    def compare(self, pruned: Pruned, windows: Windows, batch_size: int, part: Path) -> list[EvalRow]:
        """Measure the dense and the pruned model on held-out windows, and print it."""
        state = part / "evaluation.json"
        discard_damaged(self.reporter, state, read_state)
        model = self.loaded.model
        rows = compare_with_dense(self.reporter, model, {"pruned": pruned}, windows, batch_size, state)
        print_results(rows, OUT)
        return rows

    def stats(self, part: Path) -> Statistics | None:
        """Statistics of the pass, or those that an earlier result has kept."""
        kept = FitStatistics(self._calibrate(part)[0]) if self.record is None else self.record.stats()
        return None if kept is None else kept.whole

    def fit_statistics(self, part: Path) -> FitStatistics | None:
        """Those of the pass with those of its held-out windows, where a one-shot reconstruction reads them."""
        if self.record is None:
            return FitStatistics(self._calibrate(part)[0], self._hold_out(part))
        missing = self.record.missing(self.method)
        if missing is not None:
            self.reporter.say(missing)
        return self.record.stats()

    @property
    def n_held_out(self) -> int:
        """Windows that choose the damping of a one-shot reconstruction, or may choose that of another cut."""
        wanted = self.method.holds_out or self.keeps
        if self.record is not None:
            wanted = self.record.held_out_statistics is not None
        return len(held_out_windows(self.windows)) if wanted else 0

    def keep(
        self, scores: Scores, budget: Budget, protected: Protected, of_result: Mapping[str, Any], part: Path
    ) -> PruningRecord:
        """The record of this pruning; statistics that stay beside it lie in ``part``, or where they were kept.

        ``of_result`` tells what the result is measured on.
        """
        if self.record is not None:
            given: Any = {"method": self.method, "budget": budget, "protected": protected}
            if not self.keeps:
                given |= {"statistics": None, "held_out_statistics": None}
            return replace(self.record, batch_size=self.text.batch_size, held_out=of_result, **given)
        kept = self._keep_statistics(part) if self.keeps else (None, None)
        text = self.text.recipe(self.windows) if self.reads_text else None
        model = {"hash": self.model_hash, "dtype": self.loaded.source.dtype, **self.loaded.facts}
        size = self.text.batch_size
        return PruningRecord("", scores, self.method, budget, model, size, text, of_result, protected, *kept)

    @property
    def reads_text(self) -> bool:
        """Whether the calibration text is read at all."""
        return bool(self.params) or self.method.reconstruct == "sequential"

    def _keep_statistics(self, part: Path) -> tuple[Path, Path | None]:
        """Write statistics for another cut: of the whole text, and of its held-out windows if it has any."""
        paths, held_out = (part / "kept.safetensors", part / "kept_held_out.safetensors"), self._hold_out(part)
        for path, stats in zip(paths, (self._calibrate(part)[0], held_out or {}), strict=True):
            write_stats(path, stats.values(), {"model": self.model_hash})
        return paths if held_out else (paths[0], None)

    def _hold_out(self, part: Path) -> dict[FFNSite, ChannelStats] | None:
        """The pass over the held-out windows, or its result where it is finished."""
        if not self.n_held_out:
            return None
        path = part / "held_out_calibrate.safetensors"
        options = replace(self.options(part), checkpoint=path)
        discard_damaged(self.reporter, path)
        model = self.loaded.model
        given: Any = {"sites": self.asked.sites, "options": options}
        with self.reporter.task("calibrate held-out windows", "tokens") as update, naming_weights(model):
            return collect_held_out(model, self.windows, **given, on_batch=update)

    def _calibrate(self, part: Path, *, dense: bool = True) -> tuple[dict[FFNSite, ChannelStats], Any]:
        """The pass, or its result where it is finished; and the core."""
        announce(self.reporter, self.memory())
        for path in part.glob("*calibrate.safetensors"):
            discard_damaged(self.reporter, path)
        options = self.options(part) if dense else replace(self.options(part), model_hash=None)
        given: Any = {"sites": self.asked.sites, "rule": self.asked.rule, "options": options}
        model, params = self.loaded.model, self.params if dense else self.asked.params
        with self.reporter.task("calibrate", "tokens") as update, naming_weights(model):
            return calibrate_all(model, self.windows, params, **given, on_batch=update)
