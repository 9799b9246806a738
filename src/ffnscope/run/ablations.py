"""Ablations of a run: sets of channels, doses of the core, single channels; each a stage with its files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ffnscope.analyze.ablation import ablate_channels
from ffnscope.analyze.probes import Probe, Sets, control_probes, dose_probes, run_probes
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.validate import join_validation, quality_row, stratifier, with_floor
from ffnscope.calibrate.windows import Windows
from ffnscope.io import read_state, read_tensors
from ffnscope.run.analyses import FOLDER, calibrated_keys, seed_of, tables, write_tables
from ffnscope.run.choices import MEAN, find_core
from ffnscope.run.stages import Job
from ffnscope.run.steps import discard_damaged
from ffnscope.types import ChannelStats, FFNSite, Scores

Stats = Mapping[FFNSite, ChannelStats]


def ablation_stage(job: Job, stats: Stats, scores: Mapping[str, Scores]) -> None:
    """Everything that changes the model for the length of a forward, on the first held-out text."""
    asked = job.config.ablation
    if not asked.enabled:
        return
    windows = job.held_out[0][: asked.num_samples]
    core = find_core(job.config, scores)
    if core is not None:
        _probes_stage(job, stats, scores, core, windows)
    if asked.channels:
        _channels_stage(job, scores, windows)


def _probes_stage(
    job: Job, stats: Stats, scores: Mapping[str, Scores], core: Mapping[FFNSite, Tensor], windows: Windows
) -> None:
    asked, seed = job.config.ablation, seed_of(job, job.config.ablation.seed)
    files, state = [*tables(job, "ablation"), *tables(job, "dose")], job.folder / FOLDER / "probes.json"
    metric = job.config.supernode.score_metric
    sets = control_probes(core, _halos(job), scores[metric].values, draws=asked.draws, seed=seed)
    sets += [Probe(p.name, p.channels, "mean", p.draw) for p in sets]
    given: Any = {"shares": asked.dose_shares, "draws": asked.draws, "seed": seed}
    doses = dose_probes(core, job.sites, asked.dose_sparsity, **given) if asked.dose_shares else []
    means = {site: stats[site].mean(MEAN) for site in job.sites}

    def make() -> None:
        _ready(job, state)
        per_forward = job.config.dataset.batch_size * windows.length
        size: Any = {"batch_size": job.config.dataset.batch_size, "state": state}
        with job.reporter.task("ablate sets", "tokens") as update:
            tell = partial(_tell, update, per_forward)
            found = run_probes(job.loaded.model, [*sets, *doses], windows, means=means, **size, on_batch=tell)
        rows = [one.as_dict() for one in found]
        facts = {"text": windows.source, "tokens": windows.n_tokens, "matched_by": metric}
        write_tables(files[:2], rows[: len(sets)], facts)
        write_tables(files[2:], rows[len(sets) :], facts)

    depends = [*calibrated_keys(job), job.keys["core overlap"], job.keys.get("halo"), windows.hash]
    job.stage("ablate sets", [*depends, asked.model_dump(), seed], [*files, state], make)


def _channels_stage(job: Job, scores: Mapping[str, Scores], windows: Windows) -> None:
    """Remove a stratified sample of channels one at a time, and correlate every metric with what that did."""
    asked, seed = job.config.ablation, seed_of(job, job.config.ablation.seed)
    files, state = tables(job, "ranking_quality"), job.folder / FOLDER / "channels.json"

    def make() -> None:
        _ready(job, state)
        every = with_floor(job.loaded.model, scores)
        channels = ChannelSample(asked.channels, min(asked.sites, asked.channels), seed).draw(stratifier(every))
        size: Any = {"batch_size": max(job.config.dataset.batch_size, asked.copies), "state": state}
        with job.reporter.task("ablate channels", "tokens") as update:
            found = ablate_channels(job.loaded.model, channels, windows, **size, on_tokens=update)
        result = join_validation(every, found, {}, [], windows)
        rows = [quality_row(one, {}) for one in (*result.qualities, result.between_halves)]
        change, moved = found.loss_change(), found.token_change()
        measured = [
            {"site": site.name, "layer": site.layer, "channel": c, "loss_change": a, "token_change": b}
            for site, index in channels.items()
            for c, a, b in zip(index.tolist(), change[site].tolist(), moved[site].tolist(), strict=True)
        ]
        write_tables(files, rows, {"text": windows.source, "tokens": windows.n_tokens, "channels": measured})

    depends = [job.keys["score"], windows.hash, asked.channels, asked.sites, seed]
    job.stage("ablate channels", depends, [*files, state], make)


def _halos(job: Job) -> dict[str, Sets]:
    """Halos that the run has found: name -> site -> channels; a read halo is in the FFN of the next layer."""
    if not job.config.halo.enabled:
        return {}
    tensors, facts = read_tensors(job.folder / FOLDER / "halo_sets.safetensors")
    sites = {site.name: site for site in job.sites}
    next_of: Mapping[str, str] = facts["next_sites"]
    write = {s: tensors[f"{n}/write_halo"] for n, s in sites.items() if f"{n}/write_halo" in tensors}
    read = {sites[next_of[n]]: tensors[f"{n}/read_halo"] for n in sites if f"{n}/read_halo" in tensors}
    return {name: halo for name, halo in (("write_halo", write), ("read_halo", read)) if halo}


def _ready(job: Job, state: Path) -> None:
    state.parent.mkdir(exist_ok=True)
    discard_damaged(job.reporter, state, read_state)


def _tell(update: Any, per_forward: int, done: int, total: int) -> None:
    update(done * per_forward, total * per_forward)
