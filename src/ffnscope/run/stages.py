"""The stages of a run: each composes public calls, writes files, and is skipped when they are current."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ffnscope
from ffnscope.analyze.group_sums import Stats, only, with_core
from ffnscope.analyze.levels import level_statistics, needs_core, takes_one_pass
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.apply.held_out import FitStatistics, collect_held_out, held_out_windows
from ffnscope.apply.pruned import Pruned, as_pruned
from ffnscope.calibrate.collect import (
    OnBatch,
    PassOptions,
    collect,
    join_statistics,
    weights_hash,
)
from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.compare import EvalRow, compare_plans
from ffnscope.evaluate.samples import generate_samples
from ffnscope.evaluate.tasks import TaskRow, TaskSet, compare_tasks
from ffnscope.ffn.heap import give_back_free
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.streamed import is_streamed
from ffnscope.io import (
    hash_json,
    read_json,
    read_plan,
    read_scores,
    read_state,
    read_stats,
    write_json,
    write_plan,
    write_scores,
    write_stats,
)
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.run.choices import (
    background_hash,
    calibration_extra,
    core_rule,
    find_core,
    load_background,
    load_reference,
    measured_channels,
    metric_params,
    pass_options,
    reference_hash,
)
from ffnscope.run.folder import record_config
from ffnscope.run.ledger import Ledger
from ffnscope.run.progress import Reporter, peak_memory
from ffnscope.run.schema import RunConfig
from ffnscope.run.steps import announce, compare_with_dense, discard_damaged, open_tasks, tell_few_tokens
from ffnscope.run.windows import describe_windows, evaluation_windows, sized
from ffnscope.scoring import naming_weights, score
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

Core = Mapping[FFNSite, torch.Tensor]
RECONSTRUCT = "reconstruct "
"""Beginning of the names of stages that reconstruct a plan."""
CURVES = "curves "
"""Beginning of the names of stages that measure loss curves."""
HELD_OUT = "statistics_held_out"
"""Name of the file with the statistics of held-out windows, without its ending."""


@dataclass(slots=True)
class Job:
    """A run in progress: what was asked, what is loaded, and the keys of the stages so far."""

    config: RunConfig
    folder: Path
    ledger: Ledger
    reporter: Reporter
    loaded: LoadedModel
    sites: list[FFNSite]
    model_hash: str
    calibration: Windows
    held_out: list[Windows]
    tasks: TaskSet | None = None
    reference_hash: str | None = None
    background_hash: str | None = None
    keys: dict[str, str] = field(default_factory=dict[str, str])
    made: list[str] = field(default_factory=list[str])

    @property
    def pruned_key(self) -> str:
        """What the pruned models are made of: the plans, and their reconstructions where there are any."""
        refits = [key for name, key in self.keys.items() if name.startswith(RECONSTRUCT)]
        plan = self.keys.get("plan", "")
        return hash_json([plan, *refits]) if refits else plan

    def stage(self, name: str, depends: Any, files: Sequence[Path], make: Callable[[], None]) -> None:
        """Run ``make`` unless the files of this stage are current; record files, seconds and peak memory."""
        key = hash_json({"version": ffnscope.__version__, "stage": name, "depends": depends})
        self.keys[name] = key
        if self.ledger.current(name, key):
            self.reporter.say(f"{name}: already done")
            return
        why = self.ledger.why_again(name, key)
        if why:
            self.reporter.say(f"{name}: runs again; {why}")
        self.ledger.begin(name, files)
        start = time.perf_counter()
        make()
        self.made.append(name)
        give_back_free()  # else the next stage begins with what this one has freed
        seconds = round(time.perf_counter() - start, 3)
        self.ledger.record(name, key, files, {"seconds": seconds, "peak_memory_bytes": peak_memory()})


def open_job(
    config: RunConfig, folder: Path, reporter: Reporter, loaded: LoadedModel, *, overwrite: bool = False
) -> Job:
    """Find the FFNs, hash the weights, cut all texts and try the reference model: what is missing shows at once.

    Raises:
        ArtifactError: the model or a text is another than that of the folder's results, and ``overwrite`` is not set.
    """
    ledger = Ledger(folder)
    sites = find_sites(loaded.model, config.model.tracked_layers)
    with reporter.task("read texts", "texts"):
        config, calibration = sized(config, loaded, sites)
        held_out = evaluation_windows(config, loaded)
    record_config(folder, config)
    if config.pruning.reconstructs:
        method = config.pruning.chosen(config.pruning.algorithms[0])
        tell_few_tokens(reporter, loaded.model, method, sites, calibration)
    tasks = open_tasks(config.task_options, reporter)
    hashes = weights_hash(loaded.model), reference_hash(config, sites), background_hash(config)
    texts = {"the calibration text": calibration.hash}
    texts |= {f"held-out text {i}": windows.hash for i, windows in enumerate(held_out, 1)}
    for name in ledger.accept({"the model": hashes[0], **texts}, overwrite=overwrite):
        reporter.say(f"{name} has changed since the last start: what was made from the old one is made again")
    return Job(config, folder, ledger, reporter, loaded, sites, hashes[0], calibration, held_out, tasks, *hashes[1:])


def calibrate_stage(job: Job) -> dict[FFNSite, ChannelStats]:
    """Collect the statistics of all metrics: ``statistics.safetensors``, in one pass.

    What needs the supernode core is in ``statistics_core.safetensors``: from the same pass where memory allows that
    (see `takes_one_pass`), otherwise, or when only the core has changed, from a second one.
    """
    metrics = {name: metric_params(job.config, name) for name in job.config.metric_names}
    rule, model, windows = core_rule(job.config), job.loaded.model, job.calibration
    options, extra = pass_options(job.config), calibration_extra(job.config, job.sites, windows)
    names, of_core = level_statistics(metrics, rule, extra)
    sizes: Any = {"sites": job.sites, "rule": rule, "options": options, "extra": extra}
    announce(job.reporter, calibration_bytes(model, windows, metrics, **sizes))
    ahead: Stats = {}

    def first(options: PassOptions, update: OnBatch) -> Stats:
        given: Any = {"sites": job.sites, "options": options, "on_batch": update}
        if not takes_one_pass(job.sites, metrics, options, extra):
            return collect(model, windows, names, **given)
        every = {site: torch.arange(site.d_ff) for site in job.sites}
        stats = collect(model, windows, [*names, *of_core], core=every, **given)
        measured = measured_channels(job.config, rule.find(model, stats), extra)
        ahead.update(only(with_core(stats, every, measured), of_core))
        return only(stats, names)

    stats = _statistics(job, "statistics", names, None, first)
    if not of_core:
        return stats
    core = measured_channels(job.config, rule.find(model, stats), extra)

    def second(options: PassOptions, update: OnBatch) -> Stats:
        return ahead or collect(model, windows, of_core, sites=job.sites, core=core, options=options, on_batch=update)

    return join_statistics(stats, _statistics(job, "statistics_core", of_core, core, second))


def _statistics(
    job: Job,
    name: str,
    statistics: Sequence[str],
    core: Mapping[FFNSite, torch.Tensor] | None,
    take: Callable[[PassOptions, OnBatch], Stats],
) -> Stats:
    """The stage that makes one file of statistics by ``take``."""
    path = job.folder / f"{name}.safetensors"
    part = path.with_suffix(".part.safetensors")
    options = replace(pass_options(job.config, part), model_hash=job.model_hash)
    facts = describe_windows(job.calibration)
    sizes = {"gradient_windows": options.gradient_windows, "gradient_length": options.gradient_length}
    stage = name.replace("statistics", "calibrate").replace("_", " ")

    def make() -> None:
        discard_damaged(job.reporter, part)
        with job.reporter.task(stage, "tokens") as update, naming_weights(job.loaded.model):
            stats = take(options, update)
        of = {"model": job.model_hash, **job.loaded.facts, "calibration": facts}
        write_stats(path, stats.values(), {**of, **sizes})

    chosen = {site.name: index.tolist() for site, index in (core or {}).items()}
    depends = [job.model_hash, facts["hash"], sorted(statistics), sizes, [asdict(s) for s in job.sites], chosen]
    job.stage(stage, depends, [path], make)
    return read_stats(path)[0]


def held_out_stage(job: Job, stats: Stats) -> FitStatistics:
    """Add the sums by which one-shot reconstructions choose their damping: ``statistics_held_out.safetensors``.

    Made only where the configuration asks for such reconstructions and the text has 8 windows or more.
    """
    if not (job.config.pruning.holds_out and len(held_out_windows(job.calibration))):
        return FitStatistics(stats)

    def take(options: PassOptions, update: OnBatch) -> Stats:
        given: Any = {"sites": job.sites, "options": options, "on_batch": update}
        return collect_held_out(job.loaded.model, job.calibration, **given) or {}

    return FitStatistics(stats, _statistics(job, HELD_OUT, ["h_outer"], None, take))


def score_stage(job: Job, stats: Mapping[FFNSite, ChannelStats]) -> dict[str, Scores]:
    """Score every channel with every metric: ``scores.safetensors`` and ``scores.json``."""
    path, summary = job.folder / "scores.safetensors", job.folder / "scores.json"
    params = {name: metric_params(job.config, name) for name in job.config.metric_names}
    rule = core_rule(job.config) if needs_core(params) else None
    options = pass_options(job.config)

    def make() -> None:
        model = job.loaded.model
        facts = {"model": job.model_hash, **job.loaded.facts, "calibration": describe_windows(job.calibration)}
        facts |= {name: getattr(options, name) for name in ("batch_size", "gradient_windows", "gradient_length")}
        facts |= {"core": asdict(rule)} if rule else {}
        if job.reference_hash:
            facts["reference"] = {"model": job.config.model.reference_id, "hash": job.reference_hash}
        facts |= {"background": job.background_hash} if job.background_hash else {}
        core = rule.find(model, stats) if rule else None
        extra = calibration_extra(job.config, job.sites, job.calibration)
        used = with_core(dict(stats), measured_channels(job.config, core, extra), core) if core else stats
        given: Any = {"reference": load_reference(job.config, params), "background": load_background(job.config)}
        given |= {"facts": facts, "core": core}
        found = {n: score(model, used, n, **given, **p) for n, p in params.items()}
        write_scores(path, found.values(), facts)
        write_json(summary, {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)})

    depends = [job.keys["calibrate"], job.keys.get("calibrate core"), params, rule and asdict(rule), job.reference_hash]
    depends += [job.background_hash] if job.background_hash else []
    job.stage("score", depends, [path, summary], make)
    return read_scores(path)[0]


def plan_labels(config: RunConfig) -> dict[str, tuple[str, float]]:
    """Label of every plan -> its metric and sparsity."""
    asked = config.pruning
    if not asked.enabled:
        return {}
    return {f"{metric}-{r}".removesuffix(".0"): (metric, r) for metric in asked.algorithms for r in asked.ratios}


def plan_request(job: Job, scores: Mapping[str, Scores], label: str) -> tuple[Scores, Budget, Core]:
    """What a plan is built from: scores with what its file tells of them, the budget, and channels that stay."""
    config, (metric, ratio) = job.config, plan_labels(job.config)[label]
    told = {
        "model_id": config.model.model_id,
        "scores": job.keys["score"],
        "supernode": config.supernode.model_dump(),
    }
    one = replace(scores[metric], facts={**scores[metric].facts, **told})
    core = find_core(config, scores) if config.supernode.protect_core else None
    return one, config.pruning.budget(ratio), core or {}


def make_plan(job: Job, scores: Mapping[str, Scores], label: str, curves: Curves | None = None) -> PruningPlan:
    """One plan from the scores as they are, by curves where the allocator reads them."""
    one, budget, protected = plan_request(job, scores, label)
    return build_plan(one, budget, job.config.pruning.allocator, protected=protected, curves=curves)


def plan_stage(job: Job, plan_of: Callable[[str], PruningPlan]) -> dict[str, PruningPlan]:
    """Build one plan per metric and sparsity by ``plan_of`` its label: ``plans/METRIC-SPARSITY.json``."""
    config = job.config
    paths = {label: job.folder / "plans" / f"{label}.json" for label in plan_labels(config)}
    if not paths:
        return {}

    def make() -> None:
        for label, path in paths.items():
            write_plan(path, plan_of(label))

    depends = [job.keys["score"], config.pruning.model_dump(), config.supernode.model_dump()]
    depends += [key for name, key in job.keys.items() if name.startswith(CURVES)]
    job.stage("plan", depends, list(paths.values()), make)
    return {label: read_plan(path) for label, path in paths.items()}


def evaluate_stage(job: Job, plans: Mapping[str, Pruned]) -> list[EvalRow]:
    """Evaluate the dense model and every plan on every held-out text, window by window."""
    rows: list[EvalRow] = []
    for i, windows in enumerate(job.held_out):
        state = job.folder / "evaluation" / f"windows_{i}.json"
        depends = [job.model_hash, job.pruned_key, windows.hash]
        job.stage(f"evaluate {i + 1}", depends, [state], partial(_compare, job, plans, windows, state))
        rows += compare_plans(
            job.loaded.model, plans, windows, batch_size=job.config.dataset.batch_size, state=state
        )  # reads the state: every number is there
    return rows


def _compare(job: Job, plans: Mapping[str, Pruned], windows: Windows, state: Path) -> None:
    discard_damaged(job.reporter, state, read_state)
    compare_with_dense(job.reporter, job.loaded.model, plans, windows, job.config.dataset.batch_size, state)


def tasks_stage(job: Job, plans: Mapping[str, Pruned]) -> list[TaskRow]:
    """Run the downstream tasks with the dense model and every plan: ``evaluation/tasks.json``."""
    if job.tasks is None:
        return []
    state = job.folder / "evaluation" / "tasks.json"
    given = job.loaded.model, job.loaded.tokenizer, plans, job.tasks

    def make() -> None:
        discard_damaged(job.reporter, state, read_state)
        with job.reporter.task("downstream tasks", "requests") as update:
            compare_tasks(*given, state=state, on_requests=update)

    job.stage("tasks", [job.model_hash, job.pruned_key, job.tasks.key], [state], make)
    return compare_tasks(*given, state=state)  # reads the state: every number is there


def samples_stage(job: Job, plans: Mapping[str, Pruned]) -> dict[str, list[str]]:
    """Let the dense model and every plan continue the prompts: ``samples.json``."""
    asked = job.config.evaluation.samples
    if not job.config.generates_samples:
        return {}
    path = job.folder / "samples.json"
    prompts = list(asked.prompts)
    model: Any = job.loaded.model

    def write() -> list[str]:
        return generate_samples(model, job.loaded.tokenizer, prompts, max_new_tokens=asked.max_new_tokens)

    def make() -> None:
        if is_streamed(model):
            job.reporter.say("note: a streamed model reads all weights for every token of the samples")
        with job.reporter.task("generate samples", "texts") as update:
            found = {"dense": write()}
            for label, plan in plans.items():
                update(len(found) * len(prompts), (1 + len(plans)) * len(prompts))
                with as_pruned(model, plan):
                    found[label] = write()
        write_json(path, {"prompts": prompts, "max_new_tokens": asked.max_new_tokens, "texts": found})

    job.stage("samples", [job.model_hash, job.pruned_key, asked.model_dump()], [path], make)
    return read_json(path)["texts"]
