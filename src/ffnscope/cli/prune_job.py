"""The long steps of the command prune; each leaves what it found in a folder, from which the same call goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.memory import CalibrationBytes, calibration_bytes
from ffnscope.analyze.question import Question
from ffnscope.apply.method import GRADIENT_WINDOWS, Method, reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.reconstruction import check_linear, read_reconstruction
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, scoring_facts
from ffnscope.evaluate.compare import EvalRow
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import hash_json, plan_to_dict, read_json
from ffnscope.report.tables import print_results
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import announce, compare_with_dense, discard_damaged, keep_reconstruction
from ffnscope.scoring import naming_weights
from ffnscope.types import ChannelStats, FFNSite, PruningPlan, Scores

READS_H = "obs"
"""A metric that reads just what a one-shot reconstruction does, which is asked for by its name."""


@dataclass(eq=False)
class PruneJob:
    """What is pruned by what.

    Attributes:
        loaded: the dense model.
        method: see `Method`.
        text: to calibrate on.
        inputs: the metric with what it needs; None where a plan or scores are given.
        reporter: told what is done.
    """

    loaded: LoadedModel
    method: Method
    text: opt.TextChoice
    inputs: opt.Inputs | None
    reporter: Reporter

    @cached_property
    def asked(self) -> Question:
        """What is scored; no metric where a plan or scores are given."""
        model = self.loaded.model
        return Question(model, find_sites(model), {}) if self.inputs is None else self.inputs.question(self.loaded)

    @cached_property
    def windows(self) -> Windows:
        """The calibration text."""
        return self.text.calibration(self.loaded)

    @cached_property
    def model_hash(self) -> str:
        """Hash of the dense weights; of a large model it takes long, so it is found once."""
        return weights_hash(self.loaded.model)

    @property
    def params(self) -> dict[str, Any]:
        """Metrics whose statistics the pass collects."""
        return {**self.asked.params, **({READS_H: {}} if self.method.statistics else {})}

    def options(self, part: Path | None = None) -> PassOptions:
        """Sizes of the pass."""
        backward = None if self.method.reconstruct == "none" else GRADIENT_WINDOWS
        checkpoint = part / "calibrate.safetensors" if part else None
        size = self.text.batch_size
        known = self.model_hash if part else None
        return PassOptions(size, backward, checkpoint=checkpoint, keep_checkpoint=True, model_hash=known)

    def memory(self) -> CalibrationBytes:
        """What the pass takes."""
        given: Any = {"sites": self.asked.sites, "rule": self.asked.rule, "options": self.options()}
        return calibration_bytes(self.loaded.model, self.windows, self.params, **given)

    def check_sites(self, sites: Sequence[FFNSite] | None = None) -> None:
        """Raise NotAvailableError when an FFN cannot be reconstructed, before any work."""
        if self.method.reconstruct != "none":
            check_linear(self.asked.sites if sites is None else sites)

    def score(self, part: Path) -> Scores:
        """Calibrate and score."""
        stats, core = self._calibrate(part)
        facts = scoring_facts(self.loaded, self.model_hash, self.asked, self.windows, self.text)
        with self.reporter.task("score", "metrics"):
            (found,) = self.asked.scores(stats, core, facts).values()
        return found

    def reconstruct(self, plan: PruningPlan, part: Path) -> Pruned:
        """Reconstruct a plan, or take what an earlier call left."""
        if self.method.reconstruct == "none":
            return plan
        known = [self.model_hash, plan_to_dict(plan), self.windows.hash, asdict(self.method)]
        path = part / f"reconstruction_{hash_json([*known, self.text.batch_size])[:16]}.safetensors"
        discard_damaged(self.reporter, path, read_reconstruction)
        if path.exists():
            return read_reconstruction(path)
        stats = self._calibrate(part)[0] if self.method.statistics else None
        size, known = self.text.batch_size, self.model_hash
        options = SequentialOptions(batch_size=size, checkpoint=part / "blocks", model_hash=known)
        name = f"reconstruct ({self.method.reconstruct.replace('_', '-')})"
        make = partial(reconstruct_plan, self.loaded.model, plan, self.method, windows=self.windows, stats=stats)
        return keep_reconstruction(self.reporter, name, path, options, make)

    def compare(self, pruned: Pruned, held_out: opt.TextChoice, part: Path) -> list[EvalRow]:
        """Measure the dense and the pruned model on held-out text, and print it."""
        state = part / "evaluation.json"
        discard_damaged(self.reporter, state, read_json)
        windows = held_out.held_out(self.loaded)
        model, size = self.loaded.model, held_out.batch_size
        rows = compare_with_dense(self.reporter, model, {"pruned": pruned}, windows, size, state)
        print_results(rows, OUT)
        return rows

    def _calibrate(self, part: Path) -> tuple[dict[FFNSite, ChannelStats], Any]:
        """The pass, or its result where it is finished; and the core."""
        announce(self.reporter, self.memory())
        for path in part.glob("*calibrate.safetensors"):
            discard_damaged(self.reporter, path)
        given: Any = {"sites": self.asked.sites, "rule": self.asked.rule, "options": self.options(part)}
        model = self.loaded.model
        with self.reporter.task("calibrate", "tokens") as update, naming_weights(model):
            return calibrate_all(model, self.windows, self.params, **given, on_batch=update)
