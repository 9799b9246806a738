"""What has to hold between the blocks of a configuration. Each rule yields problems; none raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from ffnscope.apply.export import SHARD
from ffnscope.calibrate.corpora import SPLITS
from ffnscope.errors import UsageError
from ffnscope.registry import METRICS
from ffnscope.run.contextual_checks import contextual_findings
from ffnscope.run.document import KeyPath, show
from ffnscope.run.explain import explain, unknown_key
from ffnscope.run.finding import Finding, finding
from ffnscope.run.metric_arguments import parse_arguments
from ffnscope.run.planned import PLANNED_KEYS, not_available
from ffnscope.run.saving import UNEVEN
from ffnscope.run.schema import RunConfig
from ffnscope.run.texts import SHIPPED_TEXTS, TextSource

_LOADER_KEYS = {
    **{key: key for key in ("revision", "dtype", "device_map", "max_memory", "offload_folder", "cache_dir")},
    "torch_dtype": "dtype",
    "token": "token_env",
    "local_files_only": "offline",
    "use_safetensors": "allow_pickle",
    "trust_remote_code": "trust_remote_code",
}
"""Argument of `from_pretrained` -> the key of the model block that sets it."""


def check_all(config: RunConfig) -> Iterator[Finding]:
    """Yield every problem between the blocks."""
    for rule in (
        _planned,
        _dependency,
        _scar_sizes,
        _scar_off,
        _chat,
        _core,
        _analyses,
        _ablation,
        _inputs,
        _background,
        _model_kwargs,
        _device_map,
        _text_keys,
        _splits,
        _mixture,
        _held_out,
        _tasks,
        _checkpoints,
        _reconstruction,
        contextual_findings,
    ):
        yield from rule(config)
    yield from _metric_blocks(config)


def _planned(config: RunConfig) -> Iterator[Finding]:
    for dotted, supported in PLANNED_KEYS.items():
        block, key = dotted.split(".")
        value = getattr(getattr(config, block), key)
        if value != supported:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield finding((block, key), not_available(f"'{key}: {shown}'"))


def _dependency(config: RunConfig) -> Iterator[Finding]:
    if not config.pruning.dependency_aware:
        yield finding(
            ("pruning", "dependency_aware"),
            "cannot be false: a channel is its coupled weights (its rows of gate and up, its column of down), "
            "so they are removed together. Remove this key",
        )


def _scar_sizes(config: RunConfig) -> Iterator[Finding]:
    for key in ("num_samples", "max_length"):
        asked, limit = getattr(config.metrics.scar, key), getattr(config, key)
        if asked is not None and asked > limit:
            yield finding(
                ("metrics", "scar", key),
                f"must be at most calibration.{key} = {limit}, because the backward pass runs on the calibration's "
                f"windows; got {asked}",
                ("calibration", key),
            )


def _used_metrics(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    yield from ((("metrics", "enabled", i), name) for i, name in enumerate(config.metrics.enabled))
    if config.pruning.enabled:
        yield from ((("pruning", "algorithms", i), name) for i, name in enumerate(config.pruning.algorithms))
    if config.supernode.enabled:
        yield ("supernode", "score_metric"), config.supernode.score_metric


def _scar_off(config: RunConfig) -> Iterator[Finding]:
    if config.metrics.scar.enabled:
        return
    for path, name in _used_metrics(config):
        if name.startswith("scar_"):
            message = f"{name!r} needs the backward pass, but metrics.scar.enabled is false. Set it to true"
            yield finding(path, f"{message} or choose another metric", ("metrics", "scar", "enabled"), path[:2])


def _chat(config: RunConfig) -> Iterator[Finding]:
    if config.calibration.answers_only and config.calibration.mode != "chat":
        yield finding(
            ("calibration", "answers_only"),
            f"needs 'mode: chat', the only one that knows which tokens are answers; got {config.calibration.mode!r}",
            ("calibration", "mode"),
        )


def _core(config: RunConfig) -> Iterator[Finding]:
    core = config.supernode
    if core.core_fraction is not None and core.top_k is not None:
        yield finding(("supernode", "top_k"), "replaces core_fraction, and both are given. Keep one")
        return
    if not (core.enabled and core.protect_core and config.pruning.enabled) or core.core_fraction is None:
        return
    for i, sparsity in enumerate(config.pruning.ratios):
        if sparsity + core.core_fraction > 1:
            yield finding(
                ("pruning", "ratios", i),
                f"cannot remove {sparsity:g} of the channels while supernode.protect_core keeps {core.core_fraction:g}",
                ("supernode",),
                ("pruning", "ratios"),
            )


def _analyses(config: RunConfig) -> Iterator[Finding]:
    """Analyses of the core need one, and those of q = h g a backward pass."""
    core, asked = config.supernode, config.supernode.stability
    blocks: dict[KeyPath, bool] = {(name,): getattr(config, name).enabled for name in ("halo", "cross_layer")}
    blocks[("supernode", "stability")] = asked.enabled
    for path, enabled in blocks.items():
        if enabled and not core.enabled:
            message = "needs the supernode core, but supernode.enabled is false. Set it to true"
            yield finding((*path, "enabled"), message, ("supernode", "enabled"))
        elif enabled and path != ("supernode", "stability") and not config.metrics.scar.enabled:
            message = "needs the backward pass, but metrics.scar.enabled is false. Set it to true"
            yield finding((*path, "enabled"), message, ("metrics", "scar", "enabled"))
    if core.null_pool is not None and not (config.halo.enabled or config.cross_layer.enabled):
        yield finding(("supernode", "null_pool"), "would do nothing: neither halo nor cross_layer is enabled")
    if config.halo.enabled and core.halo_fraction is not None and core.halo_fraction > 0.5:
        message = "must be at most 0.5 with halo.enabled, so that as many other channels are left to compare with"
        yield finding(("supernode", "halo_fraction"), f"{message}; got {core.halo_fraction:g}", ("halo", "enabled"))
    for key in ("seeds", "texts"):
        if getattr(asked, key) and not asked.enabled:
            yield finding(("supernode", "stability", key), "would do nothing without 'enabled: true'")
    if config.concentration.enabled and config.concentration.jackknife and _cuts_gradients(config):
        message = "needs all windows whole, because sums of documents must add up; remove metrics.scar.num_samples"
        yield finding(("concentration", "jackknife"), message, ("metrics", "scar", "num_samples"))


def _cuts_gradients(config: RunConfig) -> bool:
    return config.scar_num_samples < config.num_samples


def _ablation(config: RunConfig) -> Iterator[Finding]:
    asked = config.ablation
    if asked.enabled and not config.evaluation.enabled:
        message = "needs the held-out text, but evaluation.enabled is false. Set it to true"
        yield finding(("ablation", "enabled"), message, ("evaluation", "enabled"))
    if asked.enabled and not (config.supernode.enabled or asked.channels):
        message = "would measure nothing: supernode.enabled is false, and ablation.channels is 0. Set one of them"
        yield finding(("ablation", "enabled"), message, ("supernode", "enabled"), ("ablation", "channels"))
    useless = {"sites": asked.channels, "copies": asked.channels}
    useless |= dict.fromkeys(("draws", "dose_shares", "dose_sparsity"), config.supernode.enabled)
    useless |= {"dose_sparsity": config.supernode.enabled and asked.dose_shares}
    if asked.enabled and config.evaluation.enabled and asked.num_samples > config.evaluation.num_samples:
        message = f"more than evaluation.num_samples ({config.evaluation.num_samples}): it is a part of that text"
        yield finding(("ablation", "num_samples"), message, ("evaluation", "num_samples"))
    for key, one in type(asked).model_fields.items():
        if key == "enabled" or getattr(asked, key) == one.default:
            continue
        if not asked.enabled:
            yield finding(("ablation", key), "would do nothing without 'enabled: true'", ("ablation", "enabled"))
        elif not useless.get(key, True):
            what = "ablation.channels" if key in ("sites", "copies") else "a core (supernode.enabled) to measure"
            yield finding(("ablation", key), f"would do nothing without {what}", ("ablation", "channels"))


def _inputs(config: RunConfig) -> Iterator[Finding]:
    """What metrics need beyond statistics and weights, and keys that nothing would read."""
    used = dict(_used_metrics(config))
    rules = {path: METRICS.get(name) for path, name in used.items() if name in METRICS.names()}
    if any("core" in rule.inputs for rule in rules.values()):
        rules[("supernode", "score_metric")] = METRICS.get(config.supernode.score_metric)
    for path, rule in rules.items():
        if "reference" in rule.inputs and config.model.reference_id is None:
            yield finding(path, f"{rule.name!r} needs model.reference_id, the model before fine-tuning")
        if path == ("supernode", "score_metric") and rule.inputs:
            yield finding(path, f"{rule.name!r} itself needs the {rule.inputs[0]}; the core needs a metric without")
    reads = {key for rule in rules.values() for key in (*rule.inputs, *rule.params)}
    if config.model.reference_id is not None and "reference" not in reads:
        yield finding(("model", "reference_id"), "would do nothing: no metric that is scored reads a reference model")
    if config.supernode.halo_fraction is not None and "halo_fraction" not in reads and not config.halo.enabled:
        yield finding(("supernode", "halo_fraction"), "would do nothing: no metric that is scored reads the halo")


def _background(config: RunConfig) -> Iterator[Finding]:
    """A text to compare with is given where a metric compares two, and only there."""
    names = {name for _, name in _used_metrics(config)}
    contrast = [name for name in names if config.metrics.params.get(name, {}).get("teleport") == "contrast"]
    if contrast and config.metrics.background is None:
        yield finding(
            ("metrics", min(contrast), "teleport"),
            "'contrast' compares two texts. Give metrics.background: the statistics.safetensors that `ffnscope score "
            "--out` wrote for the other one, with the same metric",
            ("metrics", "background"),
        )
    if not contrast and config.metrics.background is not None:
        yield finding(("metrics", "background"), "would do nothing: no metric that is scored has teleport: contrast")


def _model_kwargs(config: RunConfig) -> Iterator[Finding]:
    for block in ("model_kwargs", "tokenizer_kwargs"):
        for key in getattr(config.model, block):
            if key == "ignore_mismatched_sizes":
                yield finding(("model", block, key), "would load weights at random. Remove it")
            if key in _LOADER_KEYS:
                yield finding(("model", block, key), f"is set by model.{_LOADER_KEYS[key]}. Write it there")


def _device_map(config: RunConfig) -> Iterator[Finding]:
    for key in ("max_memory", "offload_folder"):
        used = config.model.device_map is not None or (config.model.stream is not None and key == "offload_folder")
        if getattr(config.model, key) is not None and not used:
            message = "would do nothing without model.device_map. Set that, for example to auto, or remove this key"
            yield finding(("model", key), message, ("model", "device_map"))
    if config.model.stream is not None and config.model.device_map is not None:
        message = "would do nothing beside model.stream, which leaves all weights in their files. Remove one of the two"
        yield finding(("model", "device_map"), message, ("model", "stream"))


def _text_keys(config: RunConfig) -> Iterator[Finding]:
    texts: list[tuple[KeyPath, Any, str]] = [(("dataset",), config.dataset, config.dataset.name)]
    texts += [(path, text, text.name) for path, text in zip(_mix_paths(config), config.mixed_texts, strict=True)]
    if config.evaluation.enabled:
        texts.append((("evaluation",), config.evaluation, config.evaluation_text.name))
        texts += [(("evaluation", "extra", i), text, text.name) for i, text in enumerate(config.evaluation.extra)]
    for path, block, name in texts:
        for key in _useless_keys(TextSource(name=name)):
            if key in block.model_fields_set and getattr(block, key):
                kind = "a local file" if TextSource(name=name).is_file else "a text that ships with ffnscope"
                yield finding(
                    (*path, key),
                    f"has no meaning for {name!r}, {kind}. Remove it",
                    (*path, "name"),
                    ("dataset", "name"),
                )


def _splits(config: RunConfig) -> Iterator[Finding]:
    texts: list[tuple[KeyPath, TextSource]] = [(("dataset",), config.calibration_text)]
    texts += zip(_mix_paths(config), config.mixed_texts, strict=True)
    if config.evaluation.enabled:
        texts += zip(_held_out_paths(config), config.evaluation_texts, strict=True)
    for path, text in texts:
        if text.name in SHIPPED_TEXTS and text.split not in (None, *SPLITS):
            message = f"{text.name!r} has no split {text.split!r}. Known: {', '.join(SPLITS)}"
            yield finding((*path, "split"), message, (*path, "name"), ("dataset", "name"))


def _mix_paths(config: RunConfig) -> list[KeyPath]:
    return [("dataset", "mix", i) for i in range(len(config.mixed_texts))]


def _mixture(config: RunConfig) -> Iterator[Finding]:
    seen = {config.calibration_text.identity}
    for path, text in zip(_mix_paths(config), config.mixed_texts, strict=True):
        if text.identity in seen:
            message = f"the text {text.words!r} is in the mixture twice. Name another, or remove it"
            yield finding(path, message, ("dataset",))
        seen.add(text.identity)
    if config.num_samples < (count := 1 + len(config.mixed_texts)):
        message = f"{config.num_samples} window(s) cannot be shared by the {count} texts of dataset.mix"
        path = ("calibration", "num_samples")
        yield finding(path, f"{message}. Ask for {count} or more", path, ("dataset", "mix"))


def _held_out_paths(config: RunConfig) -> list[KeyPath]:
    return [("evaluation",), *(("evaluation", "extra", i) for i in range(len(config.evaluation.extra)))]


def _useless_keys(text: TextSource) -> tuple[str, ...]:
    if text.is_file:
        column = () if text.name.endswith(".jsonl") else ("text_field",)
        return ("subset", "split", "streaming", "revision", *column)
    return ("subset", "streaming", "revision", "text_field") if text.name in SHIPPED_TEXTS else ()


def _held_out(config: RunConfig) -> Iterator[Finding]:
    if not config.evaluation.enabled:
        return
    seen = {text.identity: show(path) for path, text in zip(_mix_paths(config), config.mixed_texts, strict=True)}
    seen[config.calibration_text.identity] = "dataset (the calibration)"
    for path, text in zip(_held_out_paths(config), config.evaluation_texts, strict=True):
        reads: tuple[KeyPath, ...] = (("dataset",), ("evaluation",))
        if text.split is None and not text.is_file:
            message = f"no held-out split of {text.name!r} is known"
            yield finding(path, f"{message}. Give {show((*path, 'split'))}, or another {show((*path, 'name'))}", *reads)
        elif text.identity in seen:
            cure = show((*path, "name")) + ("" if text.is_file else f" or {show((*path, 'split'))}")
            message = f"the held-out text {text.words!r} is the same as that of {seen[text.identity]}"
            yield finding(path, f"{message}. Give another {cure}", *reads)
        seen.setdefault(text.identity, show(path))


def _tasks(config: RunConfig) -> Iterator[Finding]:
    asked, path = config.evaluation.tasks, ("evaluation", "tasks")
    for key in ("num_fewshot", "limit", "batch_size"):
        if not asked.names and getattr(asked, key) != type(asked).model_fields[key].default:
            yield finding((*path, key), "would do nothing without tasks.names", (*path, "names"))
    if asked.names and not config.evaluation.enabled:
        message = "would not run: evaluation.enabled is false. Set it to true"
        yield finding((*path, "names"), message, ("evaluation", "enabled"))


def _checkpoints(config: RunConfig) -> Iterator[Finding]:
    output = config.output
    if output.checkpoints and not config.pruning.enabled:
        message = "would save nothing: pruning.enabled is false. Set it to true"
        yield finding(("output", "checkpoints"), message, ("pruning", "enabled"))
    for key in ("format", "pad_to_widest", "max_shard_size"):
        if not output.checkpoints and getattr(output, key) != type(output).model_fields[key].default:
            yield finding(("output", key), "would do nothing without 'checkpoints: true'", ("output", "checkpoints"))
    if output.checkpoints and output.format == "gguf" and output.max_shard_size != SHARD:
        message = "would do nothing: 'format: gguf' writes one file. Leave it out"
        yield finding(("output", "max_shard_size"), message, ("output", "format"))


def _reconstruction(config: RunConfig) -> Iterator[Finding]:
    """Keys of a reconstruction have a meaning with one only, and it needs something that is gone."""
    asked, path = config.pruning, ("pruning",)
    sequential = asked.reconstruct == "sequential"
    useful = {"target": sequential, "damping": asked.reconstruct in ("one_shot", "sequential"), "distill": sequential}
    for key in (key for key, reads in useful.items() if not reads and getattr(asked, key) is not None):
        message = f"would do nothing with 'reconstruct: {asked.reconstruct}'. Leave it out"
        yield finding((*path, key), message, (*path, "reconstruct"))
    for i in (i for i, ratio in enumerate(asked.ratios) if asked.enabled and ratio == 0):
        if asked.reconstructs:
            message = f"0 leaves nothing for 'reconstruct: {asked.reconstruct}' to make up for. Leave it out"
            yield finding((*path, "ratios", i), message, (*path, "reconstruct"))
        elif asked.rounds > 1:
            message = f"0 leaves nothing for 'rounds: {asked.rounds}' to remove. Leave it out"
            yield finding((*path, "ratios", i), message, (*path, "rounds"))
    if asked.rounds > 1 and asked.reads_curves:
        message = f"does not go with 'allocator: {asked.allocator}', which plans by curves. Choose one"
        yield finding((*path, "rounds"), message, (*path, "allocator"))
    if asked.curves != type(asked.curves)() and not asked.reads_curves:
        message = f"would do nothing with 'allocator: {asked.allocator}', which reads no curves. Leave it out"
        yield finding((*path, "curves"), message, (*path, "allocator"))
    output = config.output
    if output.checkpoints and output.format == "gguf" and not output.pad_to_widest and asked.allocator in UNEVEN:
        message = f"{asked.allocator!r} gives FFNs different widths, and 'format: gguf' has one for all. Choose local"
        yield finding((*path, "allocator"), f"{message}, or set output.pad_to_widest", ("output",))


def _metric_blocks(config: RunConfig) -> Iterator[Finding]:
    given = config.metrics.params
    for name in given:
        if name not in METRICS.names():
            yield finding(("metrics", name), unknown_key(("metrics", name)))
    used = dict.fromkeys([*given, *(name for _, name in _used_metrics(config))])
    for name in used:
        if name in METRICS.names():
            yield from _arguments(name, given.get(name, {}))


def _arguments(name: str, given: dict[str, Any]) -> Iterator[Finding]:
    metric = METRICS.get(name)
    try:
        parsed = parse_arguments(metric, given)
        metric.needed(parsed)
    except UsageError as error:
        yield finding(("metrics", name), str(error).rstrip("."))
    except ValidationError as error:
        for item in error.errors():
            path: KeyPath = ("metrics", name, *item["loc"])
            if item["type"] != "extra_forbidden":
                yield finding(path, explain(item))
                continue
            known = ", ".join(metric.params) or "none"
            yield finding(path, f"metric {name!r} has no parameter {str(path[-1])!r}. Known: {known}")
