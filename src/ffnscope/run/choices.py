"""What the YAML chose, as arguments of the public functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ffnscope.analyze import cross_layer, halo
from ffnscope.analyze.bootstrap import bootstrap_statistics
from ffnscope.analyze.levels import CoreRule, Extra
from ffnscope.analyze.neighbours import bounded_pool, check_others, null_channels
from ffnscope.analyze.probes import check_doses
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.load import ModelSource, load_model, read_token
from ffnscope.io import hash_file, read_stats
from ffnscope.plan.build import top_core
from ffnscope.registry import METRICS
from ffnscope.run.schema import RunConfig
from ffnscope.scoring import check_reference
from ffnscope.types import ChannelStats, FFNSite, Scores

ONE_PASS_BYTES = 2**31  # with correlations of null cores, which are larger; a second pass takes much longer


def pass_options(config: RunConfig, checkpoint: Path | None = None) -> PassOptions:
    """Sizes of the calibration pass."""
    asked = config.calibration
    return PassOptions(
        batch_size=asked.batch_size,
        gradient_windows=config.scar_num_samples,
        gradient_length=config.scar_max_length,
        checkpoint=checkpoint,
        checkpoint_every=asked.checkpoint_every * asked.batch_size,
        one_pass_bytes=ONE_PASS_BYTES if compares_cores(config) else PassOptions().one_pass_bytes,
    )


MEAN = "act_sum"
"""Statistic that channels are set to the mean of."""


def compares_cores(config: RunConfig) -> bool:
    """Whether correlations of null cores are measured."""
    return config.supernode.enabled and (config.halo.enabled or config.cross_layer.enabled)


def calibration_extra(config: RunConfig, sites: Sequence[FFNSite], windows: Windows) -> Extra:
    """What the analyses need beyond the statistics of the metrics.

    Raises:
        UsageError: the sums of null cores would not fit (see `bounded_pool`); or the core is too large for what it is
            compared with.
    """
    if config.supernode.enabled:
        _check_core(config, sites)
    names: dict[str, None] = {}
    if config.concentration.enabled:
        names |= dict.fromkeys(bootstrap_statistics({m: metric_params(config, m) for m in config.metric_names}))
    rule = core_rule(config)
    if config.supernode.enabled and config.supernode.stability.enabled:
        names |= dict.fromkeys(bootstrap_statistics({rule.metric: rule.params}))
    if config.ablation.enabled and config.supernode.enabled:
        names[MEAN] = None
    groups = min(pass_options(config).document_groups, len(windows.document.unique())) if names else 0
    if config.pruning.enabled:
        method = config.pruning.chosen(config.pruning.algorithms[0])
        names |= dict.fromkeys((*method.statistics, *method.curve_statistics))
    pool = 0
    if compares_cores(config):
        asked = (config.halo.enabled, halo), (config.cross_layer.enabled, cross_layer)
        of_core = list(dict.fromkeys(name for enabled, one in asked if enabled for name in one.CORE_NEEDS))
        names |= {name: None for enabled, one in asked if enabled for name in one.NEEDS}
        names |= dict.fromkeys(of_core)
        pool = bounded_pool(sites, of_core, rule.size(sites), config.supernode.null_pool)
    return Extra(tuple(names), pool, groups)


def _check_core(config: RunConfig, sites: Sequence[FFNSite]) -> None:
    """Raise UsageError before a pass where an analysis would find the core too large."""
    rule, asked = core_rule(config), config.ablation
    for site in sites:
        size, pool = min(rule.size([site]), site.d_ff), config.supernode.null_pool
        if compares_cores(config):
            check_others(site, size, min(site.d_ff - size, site.d_ff if pool is None else pool))
        if asked.enabled:
            check_doses(site, size, asked.dose_sparsity, asked.dose_shares)


def measured_channels(config: RunConfig, core: Mapping[FFNSite, Tensor], extra: Extra) -> dict[FFNSite, Tensor]:
    """Channels whose correlations with others are measured: the core, and those that null cores are drawn from."""
    return null_channels(core, extra.pool, config.experiment.seed) if extra.pool else dict(core)


def load_reference(config: RunConfig, metrics: Iterable[str]) -> nn.Module | None:
    """Load the model before fine-tuning when a metric needs it."""
    source = _reference_source(config, metrics)
    return None if source is None else load_model(source).model


def reference_bytes(config: RunConfig) -> int:
    """Memory of the model before fine-tuning; 0 when no metric needs it.

    Its checkpoint is found and opened, as the run will do it, but no weight is read.
    """
    source = _reference_source(config, config.metric_names)
    if source is None:
        return 0
    model = load_model(replace(source, device_map="meta")).model
    return sum(p.numel() * p.element_size() for p in model.parameters())


def reference_hash(config: RunConfig, sites: Sequence[FFNSite]) -> str | None:
    """Hash of the model before fine-tuning, when a metric needs it: loaded, checked and let go before a pass starts."""
    reference = load_reference(config, config.metric_names)
    if reference is None:
        return None
    check_reference(reference, sites)
    return weights_hash(reference)


def model_source(config: RunConfig) -> ModelSource:
    """Translate the YAML's model block for the loader."""
    asked = config.model
    return ModelSource(
        asked.model_id,
        asked.revision,
        asked.dtype,
        config.experiment.device,
        asked.device_map,
        asked.trust_remote_code,
        dict(asked.model_kwargs),
        dict(asked.tokenizer_kwargs),
        max_memory=asked.max_memory,
        offload_folder=asked.offload_folder,
        cache_dir=asked.cache_dir,
        token=read_token(asked.token_env),
        offline=asked.offline,
        allow_pickle=asked.allow_pickle,
        stream=asked.stream,
    )


def _reference_source(config: RunConfig, metrics: Iterable[str]) -> ModelSource | None:
    if not any("reference" in METRICS.get(name).inputs for name in metrics):
        return None
    assert config.model.reference_id is not None, "checked when the configuration was read"
    return replace(model_source(config), model_id=config.model.reference_id, revision=None)


def core_rule(config: RunConfig) -> CoreRule:
    """What the supernode core is, as the YAML says."""
    asked = config.supernode
    params = metric_params(config, asked.score_metric)
    return CoreRule(asked.score_metric, asked.core_fraction or 0.01, asked.top_k, params)


def metric_params(config: RunConfig, name: str) -> dict[str, Any]:
    """Arguments of a metric as the YAML gives them; seed and halo_fraction come from their own blocks if not given."""
    known = METRICS.get(name).params
    shared = {"seed": config.experiment.seed, "halo_fraction": config.supernode.halo_fraction}
    defaults = {k: v for k, v in shared.items() if k in known and v is not None}
    return {**defaults, **config.metric_arguments(name)}


def load_background(config: RunConfig) -> dict[FFNSite, ChannelStats] | None:
    """Read the statistics of the text that a metric compares with."""
    path = config.metrics.background
    return None if path is None else read_stats(Path(path).expanduser())[0]


def background_hash(config: RunConfig) -> str | None:
    """Hash of the file of `load_background`, which is read and let go before a pass starts."""
    path = config.metrics.background
    return None if load_background(config) is None else hash_file(Path(path or "").expanduser())


def find_core(config: RunConfig, scores: Mapping[str, Scores]) -> dict[FFNSite, Tensor] | None:
    """Return the supernode core of every site, or None when none was asked for."""
    rule = core_rule(config)
    return top_core(scores[rule.metric], rule.fraction, count=rule.count) if config.supernode.enabled else None
