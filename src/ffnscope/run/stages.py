"""The stages of a run: each composes public calls, writes files, and is skipped when they are current."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ffnscope
from ffnscope.apply.mask import masked
from ffnscope.calibrate.collect import PassOptions, calibrate, required_statistics, weights_hash
from ffnscope.calibrate.text import TextSource, load_windows
from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.compare import EvalRow, compare_plans
from ffnscope.evaluate.samples import generate_samples
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import (
    hash_json,
    read_json,
    read_plan,
    read_scores,
    read_stats,
    write_json,
    write_plan,
    write_scores,
    write_stats,
)
from ffnscope.plan.build import build_plan, top_core
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.run import texts
from ffnscope.run.ledger import Ledger
from ffnscope.run.progress import Reporter, peak_memory
from ffnscope.run.schema import RunConfig
from ffnscope.scoring import score
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores


@dataclass(slots=True)
class Job:
    """A run in progress: what was asked, what is loaded, and the keys of the stages so far."""

    config: RunConfig
    folder: Path
    ledger: Ledger
    reporter: Reporter
    loaded: LoadedModel
    sites: list[FFNSite] = field(default_factory=list[FFNSite])
    model_hash: str = ""
    keys: dict[str, str] = field(default_factory=dict[str, str])
    texts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def stage(self, name: str, depends: Any, files: Sequence[Path], make: Callable[[], None]) -> None:
        """Run ``make`` unless the files of this stage are current; record files, seconds and peak memory."""
        key = hash_json({"version": ffnscope.__version__, "stage": name, "depends": depends})
        self.keys[name] = key
        if self.ledger.current(name, key):
            self.reporter.say(f"{name}: already done")
            return
        start = time.perf_counter()
        make()
        seconds = round(time.perf_counter() - start, 3)
        self.ledger.record(name, key, files, {"seconds": seconds, "peak_memory_bytes": peak_memory()})


def open_job(config: RunConfig, folder: Path, reporter: Reporter, loaded: LoadedModel) -> Job:
    """Find the FFNs and hash the weights."""
    job = Job(config, folder, Ledger(folder), reporter, loaded)
    job.sites = find_sites(loaded.model, config.model.tracked_layers)
    job.model_hash = weights_hash(loaded.model)
    return job


def calibration_windows(config: RunConfig, tokenizer: Any) -> Windows:
    """Cut the calibration text into the windows that the configuration asks for."""
    asked = config.calibration
    return load_windows(
        text_source(config.calibration_text),
        tokenizer,
        n=asked.num_samples,
        length=asked.max_length,
        mode=asked.mode,
        seed=config.seed,
        answers_only=asked.answers_only,
    )


def evaluation_windows(config: RunConfig, tokenizer: Any) -> list[Windows]:
    """Windows of every held-out text: contiguous blocks, or chats when the calibration is on chats."""
    chat = config.calibration.mode == "chat"
    return [
        load_windows(
            text_source(text),
            tokenizer,
            n=config.evaluation.num_samples,
            length=config.evaluation_max_length,
            mode="chat" if chat else "contiguous",
            seed=config.seed,
            answers_only=chat and config.calibration.answers_only,
        )
        for text in config.evaluation_texts
    ]


def text_source(text: texts.TextSource) -> TextSource:
    """Turn the YAML's text into the loader's."""
    return TextSource(**{name: getattr(text, name) for name in type(text).model_fields})


def describe_windows(windows: Windows) -> dict[str, Any]:
    """Facts of a text for the record."""
    return {
        "text": windows.source,
        "windows": len(windows),
        "length": windows.length,
        "tokens": windows.n_tokens,
        "predicted_tokens": windows.n_targets,
        "hash": windows.hash,
    }


def calibrate_stage(job: Job) -> dict[FFNSite, ChannelStats]:
    """Collect the statistics of all metrics in one pass: ``statistics.safetensors``."""
    config = job.config
    windows = calibration_windows(config, job.loaded.tokenizer)
    facts = describe_windows(windows)
    job.texts["calibration"] = facts
    path, part = job.folder / "statistics.safetensors", job.folder / "statistics.part.safetensors"
    scar = config.metrics.scar
    options = PassOptions(
        batch_size=config.calibration.batch_size,
        gradient_windows=scar.num_samples,
        gradient_length=scar.max_length,
        checkpoint=part,
        checkpoint_every=config.calibration.checkpoint_every * config.calibration.batch_size,
    )
    names = required_statistics(config.metric_names)
    sizes = {"gradient_windows": scar.num_samples, "gradient_length": scar.max_length}
    depends = [job.model_hash, facts["hash"], names, sizes, [asdict(s) for s in job.sites]]

    def make() -> None:
        with job.reporter.task("calibrate", "tokens") as update:
            stats = calibrate(
                job.loaded.model, windows, config.metric_names, sites=job.sites, options=options, on_batch=update
            )
        write_stats(path, stats.values(), {"model": job.model_hash, "calibration": facts, **sizes})
        part.unlink(missing_ok=True)

    job.stage("calibrate", depends, [path], make)
    return read_stats(path)[0]


def score_stage(job: Job, stats: Mapping[FFNSite, ChannelStats]) -> dict[str, Scores]:
    """Score every channel with every metric: ``scores.safetensors`` and ``scores.json``."""
    config = job.config
    path, summary = job.folder / "scores.safetensors", job.folder / "scores.json"
    params = {name: config.metric_arguments(name) for name in config.metric_names}

    def make() -> None:
        facts = {"model": job.model_hash, "calibration": job.texts["calibration"]}
        found = {n: score(job.loaded.model, stats, n, facts=facts, **p) for n, p in params.items()}
        write_scores(path, found.values(), facts)
        write_json(summary, {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)})

    job.stage("score", [job.keys["calibrate"], params], [path, summary], make)
    return read_scores(path)[0]


def plan_stage(job: Job, scores: Mapping[str, Scores]) -> dict[str, PruningPlan]:
    """Build one plan per metric and sparsity: ``plans/METRIC-SPARSITY.json``."""
    config = job.config
    core = find_core(config, scores)
    if not config.pruning.enabled:
        return {}
    asked = config.pruning
    budgets = {r: Budget(r, asked.multiple_of, asked.min_width) for r in asked.ratios}
    names = {f"{metric}-{ratio:g}": (metric, ratio) for metric in asked.algorithms for ratio in asked.ratios}
    paths = {label: job.folder / "plans" / f"{label}.json" for label in names}

    def make() -> None:
        for label, (metric, ratio) in names.items():
            plan = build_plan(
                scores[metric],
                budgets[ratio],
                asked.allocator,
                protected=core if config.supernode.protect_core else None,
                provenance={"scores": job.keys["score"], "supernode": config.supernode.model_dump()},
            )
            write_plan(paths[label], plan)

    depends = [job.keys["score"], asked.model_dump(), config.supernode.model_dump()]
    job.stage("plan", depends, list(paths.values()), make)
    return {label: read_plan(path) for label, path in paths.items()}


def find_core(config: RunConfig, scores: Mapping[str, Scores]) -> dict[FFNSite, torch.Tensor] | None:
    """Return the supernode core of every site, or None when none was asked for."""
    asked = config.supernode
    if not asked.enabled:
        return None
    return top_core(scores[asked.score_metric], asked.core_fraction or 0.01, count=asked.top_k)


def evaluate_stage(job: Job, plans: Mapping[str, PruningPlan]) -> list[EvalRow]:
    """Evaluate the dense model and every plan on every held-out text, window by window."""
    rows: list[EvalRow] = []
    if not job.config.evaluation.enabled:
        return rows
    plan_keys = job.keys.get("plan", "")
    for i, windows in enumerate(evaluation_windows(job.config, job.loaded.tokenizer)):
        facts = describe_windows(windows)
        job.texts[f"evaluation_{i}"] = facts
        state = job.folder / "evaluation" / f"windows_{i}.json"
        name = f"evaluate {i + 1}"
        depends = [job.model_hash, plan_keys, facts["hash"]]
        job.stage(name, depends, [state], partial(_compare, job, plans, windows, state))
        rows += compare_plans(job.loaded.model, plans, windows, batch_size=job.config.dataset.batch_size, state=state)
    return rows


def _compare(job: Job, plans: Mapping[str, PruningPlan], windows: Windows, state: Path) -> None:
    size = job.config.dataset.batch_size
    per_batch = size * windows.length * (1 + len(plans))
    with job.reporter.task(f"evaluate on {windows.source.split(':')[0]}", "tokens") as update:
        compare_plans(
            job.loaded.model,
            plans,
            windows,
            batch_size=size,
            state=state,
            on_batch=lambda done, total: update(done * per_batch, total * per_batch),
        )


def samples_stage(job: Job, plans: Mapping[str, PruningPlan]) -> dict[str, list[str]]:
    """Let the dense model and every plan continue the prompts: ``samples.json``."""
    asked = job.config.evaluation.samples
    if not (job.config.evaluation.enabled and asked.enabled):
        return {}
    path = job.folder / "samples.json"
    prompts = list(asked.prompts)
    model: Any = job.loaded.model

    def make() -> None:
        found: dict[str, list[str]] = {}
        with job.reporter.task("generate samples", "texts") as update:
            found["dense"] = generate_samples(model, job.loaded.tokenizer, prompts, max_new_tokens=asked.max_new_tokens)
            for i, (label, plan) in enumerate(plans.items()):
                with masked(model, plan):
                    found[label] = generate_samples(
                        model, job.loaded.tokenizer, prompts, max_new_tokens=asked.max_new_tokens
                    )
                update((i + 2) * len(prompts), (1 + len(plans)) * len(prompts))
        write_json(path, {"prompts": prompts, "max_new_tokens": asked.max_new_tokens, "texts": found})

    job.stage("samples", [job.model_hash, job.keys.get("plan", ""), asked.model_dump()], [path], make)
    return read_json(path)["texts"]
