"""The analyses of a run, each a stage with files in ``analysis/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ffnscope.analyze.bootstrap import LEVEL, Bootstrap, why_not
from ffnscope.analyze.concentration import GRID, Concentration, concentration
from ffnscope.analyze.core import CoreOverlap, core_overlap, core_stability
from ffnscope.analyze.cross_layer import cross_layer
from ffnscope.analyze.halo import HaloOptions, halo_analysis
from ffnscope.analyze.nulls import enough_draws
from ffnscope.analyze.paired import paired_losses
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeats import Repeat, repeat_scores
from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.evaluate.progress import open_progress, plan_key
from ffnscope.io import read_tensors, write_csv, write_json, write_tensors
from ffnscope.registry import METRICS
from ffnscope.run.choices import (
    calibration_extra,
    core_rule,
    find_core,
    load_reference,
    measured_channels,
    metric_params,
    pass_options,
)
from ffnscope.run.stages import Job
from ffnscope.run.windows import calibration_windows
from ffnscope.types import ChannelStats, FFNSite, Scores

FOLDER = "analysis"
Stats = Mapping[FFNSite, ChannelStats]
Core = Mapping[FFNSite, Tensor]
PROTECTED = ("supernode_protection_score", "supernode_connectivity_score")
PLAIN = "scar_loss_proxy"


def analyses_stage(job: Job, stats: Stats, scores: Mapping[str, Scores]) -> None:
    """Everything that is analysed from statistics and scores."""
    if job.config.concentration.enabled and scores:
        _concentration_stage(job, stats, scores)
    core = find_core(job.config, scores)
    if core is None:
        return
    sets = _overlap_stage(job, core, scores)
    if job.config.supernode.stability.enabled:
        _stability_stage(job, stats, core)
    if job.config.halo.enabled:
        sets |= _halo_stage(job, stats, core)
    if job.config.cross_layer.enabled:
        _cross_layer_stage(job, stats, core)
    _sets_stage(job, sets)


def _concentration_stage(job: Job, stats: Stats, scores: Mapping[str, Scores]) -> None:
    asked = job.config.concentration
    files = [*tables(job, "concentration"), job.folder / FOLDER / "lorenz.json"]

    def make() -> None:
        repeat = _repeat(job, scores) if asked.jackknife else None
        sums = Bootstrap(job.loaded.model, stats, asked.draws, seed_of(job, asked.seed))
        with job.reporter.task("concentration", "metrics") as update:
            found = concentration(scores, bootstrap=sums, repeat=repeat, on_metric=update)
        facts = {**_concentration_facts(found), "documents": len(job.calibration.document.unique())}
        write_tables(files, found.rows(), facts)
        write_json(files[2], {"fractions": list(GRID), "curves": found.curves})

    job.stage("concentration", [job.keys["score"], *calibrated_keys(job), asked.model_dump()], files, make)


def _concentration_facts(found: Concentration) -> dict[str, Any]:
    medians = {
        metric: {
            "top1": one.value,
            "low": one.interval[0] if one.interval else None,
            "high": one.interval[1] if one.interval else None,
            "least": one.least,
            "greatest": one.greatest,
            "sites": one.n_sites,
            "sentence": found.headline(metric),
        }
        for metric, one in found.medians.items()
    }
    methods = {one.metric: one.method for one in found.spreads}
    return {"groups": found.groups, "level": LEVEL, "method": methods, "medians": medians, "refused": found.refused}


def _repeat(job: Job, scores: Mapping[str, Scores]) -> Repeat | None:
    """Scores without each group of documents, of the metrics that have no bootstrap but read text."""
    params = {name: metric_params(job.config, name) for name in scores}
    left = {name: p for name, p in params.items() if METRICS.get(name).needed(p) and why_not(name, p) is not None}
    if not left:
        return None
    asked = Question(job.loaded.model, job.sites, left, core_rule(job.config), load_reference(job.config, left))
    with job.reporter.task("leave documents out", "tokens") as update:
        return repeat_scores(asked, job.calibration, options=_whole(job), on_batch=update)


def _overlap_stage(job: Job, core: Core, scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Compare the core with other top sets, and return the sets of all."""
    metric = job.config.supernode.score_metric
    found = core_overlap(core, scores, defined_by=metric)
    facts = {"core": metric, "activation_outliers": found.outliers, "refused": found.refused}
    files = tables(job, "core_overlap")
    depends = [job.keys["score"], job.config.supernode.model_dump(exclude={"stability"})]
    job.stage("core overlap", depends, files, lambda: write_tables(files, found.rows(), facts))
    return {f"{site.name}/core": index for site, index in core.items()} | _named(found)


def _named(found: CoreOverlap) -> dict[str, Tensor]:
    places = {name: name if name == "activation_outliers" else f"top/{name}" for name in found.sets}
    return {f"{site.name}/{places[name]}": i for name, one in found.sets.items() for site, i in one.items()}


def _stability_stage(job: Job, stats: Stats, core: Core) -> None:
    asked, rule = job.config.supernode.stability, core_rule(job.config)
    sources: dict[str, dict[str, Any]] = {f"seed {seed}": {"seed": seed} for seed in asked.seeds}
    sources |= {text.words: {"text": text} for text in job.config.stability_texts}
    others = {label: _other_core(job, i, label, chosen) for i, (label, chosen) in enumerate(sources.items())}
    files = tables(job, "core_stability")

    def make() -> None:
        given: Any = {"rule": rule, "model": job.loaded.model, "stats": stats, "seed": job.config.experiment.seed}
        found = core_stability(core, others, **given)
        write_tables(files, found.rows(), {"core": rule.metric, "skipped": found.skipped})

    keys = [job.keys[f"core {label}"] for label in sources]
    job.stage("core stability", [*calibrated_keys(job), job.keys["core overlap"], *keys], files, make)


def _other_core(job: Job, index: int, label: str, chosen: Mapping[str, Any]) -> Core:
    """The core that another seed or text gives: a stage with a file of its own."""
    rule, path = core_rule(job.config), job.folder / FOLDER / f"core_{index}.safetensors"
    windows = calibration_windows(job.config, job.loaded.tokenizer, **chosen)

    def make() -> None:
        with job.reporter.task(f"core of {label}", "tokens") as update:
            options, needs = pass_options(job.config), {rule.metric: rule.params}
            other = calibrate(job.loaded.model, windows, needs, sites=job.sites, options=options, on_batch=update)
        core = rule.find(job.loaded.model, other)
        write_tensors(path, {s.name: i for s, i in core.items()}, {"kind": "core", "text": label})

    depends = [job.model_hash, windows.hash, rule.metric, dict(rule.params), rule.fraction, rule.count, *_sizes(job)]
    job.stage(f"core {label}", [*depends, [site.name for site in job.sites]], [path], make)
    tensors, _ = read_tensors(path)
    return {site: tensors[site.name] for site in job.sites}


def _halo_stage(job: Job, stats: Stats, core: Core) -> dict[str, Tensor]:
    asked = job.config.halo
    files = [*tables(job, "halo"), job.folder / FOLDER / "halo_sets.safetensors"]
    draws = asked.draws or enough_draws(len(job.sites))
    options = HaloOptions(job.config.supernode.halo_fraction or 0.1, draws=draws, seed=seed_of(job, asked.seed))

    def make() -> None:
        with job.reporter.task("halo", "FFNs") as update:
            found = halo_analysis(job.loaded.model, stats, core, _measured(job, core), options, on_site=update)
        facts = {"next_sites": {a.name: b.name for a, b in found.next_sites.items()}, "refused": found.refused}
        facts |= {"few_tokens": found.few_tokens, "pool": _pool(job), "fraction": options.fraction}
        write_tables(files, found.rows(), facts)
        sets = {f"{site.name}/write_halo": i for site, i in found.write_halo.items()}
        sets |= {f"{site.name}/read_halo": i for site, i in found.read_halo.items()}
        write_tensors(files[2], sets, {"kind": "channel sets", "next_sites": facts["next_sites"]})

    depends = [
        *calibrated_keys(job),
        job.keys["core overlap"],
        asked.model_dump(),
        options.fraction,
        draws,
        options.seed,
    ]
    job.stage("halo", depends, files, make)
    return read_tensors(files[2])[0]


def _cross_layer_stage(job: Job, stats: Stats, core: Core) -> None:
    asked, files = job.config.cross_layer, tables(job, "cross_layer")
    given: Any = {"draws": asked.draws or enough_draws(len(job.sites)), "seed": seed_of(job, asked.seed)}

    def make() -> None:
        with job.reporter.task("cross layer", "FFNs") as update:
            found = cross_layer(job.loaded.model, stats, core, _measured(job, core), **given, on_site=update)
        write_tables(files, found.rows(), {"refused": found.refused, "pool": _pool(job)})

    job.stage("cross layer", [*calibrated_keys(job), job.keys["core overlap"], given], files, make)


def _sets_stage(job: Job, sets: Mapping[str, Tensor]) -> None:
    """All channel sets in one file. A read halo is of the FFN of the next layer, which ``next_sites`` names."""
    path, halo = job.folder / FOLDER / "channel_sets.safetensors", job.folder / FOLDER / "halo_sets.safetensors"
    facts: dict[str, Any] = {"kind": "channel sets", "core": job.config.supernode.score_metric}
    if job.config.halo.enabled:
        facts["next_sites"] = read_tensors(halo)[1]["next_sites"]
    depends = [job.keys["core overlap"], job.keys.get("halo")]
    job.stage("channel sets", depends, [path], lambda: write_tensors(path, sets, facts))


def protection_stage(job: Job, plans: Mapping[str, Pruned]) -> None:
    """Whether SCAR-Prot and SCAR-Conn prune better than the plain loss proxy: ``analysis/protection.csv``/``.json``."""
    pairs = _pairs(plans)
    if not pairs or not job.held_out:
        return
    files = tables(job, "protection")
    states = [job.folder / "evaluation" / f"windows_{i}.json" for i in range(len(job.held_out))]
    make = partial(_protection, job, plans, pairs, states, files)
    job.stage("protection", [job.keys[f"evaluate {i + 1}"] for i in range(len(states))], files, make)


def _protection(
    job: Job,
    plans: Mapping[str, Pruned],
    pairs: Sequence[tuple[str, str]],
    states: Sequence[Path],
    files: Sequence[Path],
) -> None:
    rows: list[dict[str, Any]] = []
    for windows, state in zip(job.held_out, states, strict=True):
        measured = open_progress(state, job.loaded.model, windows)
        nll = {label: measured.total(plan_key(plans[label]), "nll") for pair in pairs for label in pair}
        for one in paired_losses(nll, windows, pairs):
            rows.append({"dataset": windows.source, "sparsity": plan_of(plans[one.first]).budget.sparsity, **one.row()})
    write_tables(files, rows, {"protected_core": job.config.supernode.enabled and job.config.supernode.protect_core})


def _pairs(plans: Mapping[str, Pruned]) -> list[tuple[str, str]]:
    """Labels of plans by each protecting metric with that of the loss proxy at the same sparsity."""
    known = {(p.metric, p.budget.sparsity): label for label, p in zip(plans, map(plan_of, plans.values()), strict=True)}
    keys = [(metric, sparsity) for metric, sparsity in known if metric in PROTECTED]
    return [(known[key], known[PLAIN, key[1]]) for key in keys if (PLAIN, key[1]) in known]


def _measured(job: Job, core: Core) -> dict[FFNSite, Tensor]:
    return measured_channels(job.config, core, calibration_extra(job.config, job.sites, job.calibration))


def _pool(job: Job) -> int:
    return calibration_extra(job.config, job.sites, job.calibration).pool


def calibrated_keys(job: Job) -> list[str]:
    """What the statistics of the run are made from."""
    return [job.keys[name] for name in ("calibrate", "calibrate core") if name in job.keys]


def _sizes(job: Job) -> list[int | None]:
    options = pass_options(job.config)
    return [options.gradient_windows, options.gradient_length]


def _whole(job: Job) -> PassOptions:
    return replace(pass_options(job.config), gradient_windows=None)


def seed_of(job: Job, asked: int | None) -> int:
    """The seed of a block, or that of the experiment."""
    return job.config.experiment.seed if asked is None else asked


def tables(job: Job, name: str) -> list[Path]:
    """Files of an analysis: CSV and JSON."""
    return [job.folder / FOLDER / f"{name}{suffix}" for suffix in (".csv", ".json")]


def write_tables(files: Sequence[Path], rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write the rows as CSV, and as JSON with the facts."""
    write_csv(files[0], rows)
    write_json(files[1], {"rows": list(rows), "facts": facts})
