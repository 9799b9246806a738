"""What the YAML chose, as arguments of the public functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ffnscope.analyze.levels import CoreRule
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.ffn.load import ModelSource, load_model, read_token
from ffnscope.io import hash_file, read_stats
from ffnscope.plan.build import top_core
from ffnscope.registry import METRICS
from ffnscope.run.schema import RunConfig
from ffnscope.scoring import check_reference
from ffnscope.types import ChannelStats, FFNSite, Scores


def pass_options(config: RunConfig, checkpoint: Path | None = None) -> PassOptions:
    """Sizes of the calibration pass."""
    asked = config.calibration
    return PassOptions(
        batch_size=asked.batch_size,
        gradient_windows=config.scar_num_samples,
        gradient_length=config.scar_max_length,
        checkpoint=checkpoint,
        checkpoint_every=asked.checkpoint_every * asked.batch_size,
    )


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
