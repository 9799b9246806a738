"""The texts of a run, cut into token windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ffnscope.calibrate.forward import check_windows
from ffnscope.calibrate.pack import Cut
from ffnscope.calibrate.text import TextSource, check_text, load_cut, load_documents, load_windows
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.load import LoadedModel
from ffnscope.run import texts
from ffnscope.run.defaults import enough_windows
from ffnscope.run.schema import RunConfig
from ffnscope.types import FFNSite


def check_texts(config: RunConfig) -> None:
    """Raise TextError when a text is missing or not readable: before a model is loaded, whose tokenizer cuts it."""
    second = config.contextual_text
    others = map(text_source, (*config.stability_texts, *([second] if second else [])))
    for source in (calibration_source(config), *_held_out_sources(config), *others):
        check_text(source)


def sized(config: RunConfig, loaded: LoadedModel, sites: Sequence[FFNSite]) -> tuple[RunConfig, Windows]:
    """Cut the calibration text, and fill in how many windows there are where the configuration leaves that to the FFNs.

    Raises:
        UsageError: too few windows for a distillation, or windows that are too long for the model or hold token ids
            that it does not know.
        TextError: the text is too short.
    """
    asked = config.calibration
    cut = Cut(config.num_samples, config.max_length, asked.mode, config.seed, asked.answers_only)
    if config.grows:
        enough = enough_windows(loaded.model, sites, config.max_length)
        cut = replace(cut, n=max(config.num_samples, enough), least=config.num_samples)
    windows = load_cut(calibration_source(config), loaded.tokenizer, cut)
    check_windows(loaded.model, windows)
    if config.pruning.reconstructs:
        config.pruning.chosen(config.pruning.algorithms[0]).check_windows(len(windows))
    if not config.grows:
        return config, windows
    config = config.model_copy(update={"calibration": asked.model_copy(update={"num_samples": len(windows)})})
    scar = config.metrics.scar.model_copy(update={"num_samples": config.scar_num_samples})
    return config.model_copy(update={"metrics": config.metrics.model_copy(update={"scar": scar})}), windows


def calibration_windows(
    config: RunConfig, tokenizer: Any, *, text: texts.TextSource | None = None, seed: int | None = None
) -> Windows:
    """Cut the calibration text, or another ``text``, into the windows that the configuration asks for."""
    asked = config.calibration
    return load_windows(
        text_source(text) if text else calibration_source(config),
        tokenizer,
        n=config.num_samples,
        length=config.max_length,
        mode=asked.mode,
        seed=config.seed if seed is None else seed,
        answers_only=asked.answers_only,
    )


def evaluation_windows(config: RunConfig, loaded: LoadedModel) -> list[Windows]:
    """Cut every held-out text: contiguous blocks of a text, whole conversations of a text of chats.

    The seed is the experiment's, so that runs that differ in their calibration sample are measured on one text.

    Raises:
        UsageError: windows are too long for the model, or hold token ids that it does not know.
        TextError: a text is too short.
    """
    found = [_held_out(config, source, loaded.tokenizer) for source in _held_out_sources(config)]
    for windows in found:
        check_windows(loaded.model, windows, key="evaluation.max_length")
    return found


def second_windows(config: RunConfig, tokenizer: Any) -> Windows | None:
    """Cut the second text of the contextual block as held-out texts are; None without one."""
    text = config.contextual_text
    return None if text is None else _held_out(config, text_source(text), tokenizer)


def _held_out(config: RunConfig, source: TextSource, tokenizer: Any) -> Windows:
    return load_windows(
        source,
        tokenizer,
        n=config.evaluation.num_samples,
        length=config.evaluation_max_length,
        seed=config.experiment.seed,
        answers_only=config.calibration.answers_only and _holds_chats(source),
    )


def _held_out_sources(config: RunConfig) -> list[TextSource]:
    return [text_source(text) for text in config.evaluation_texts] if config.evaluation.enabled else []


def calibration_source(config: RunConfig) -> TextSource:
    """The text that calibrates, with those mixed with it, for the loader."""
    mix = tuple(text_source(text) for text in config.mixed_texts)
    return replace(text_source(config.calibration_text), mix=mix)


def text_source(text: texts.TextSource) -> TextSource:
    """Turn the YAML's text into the loader's."""
    return TextSource(**{name: getattr(text, name) for name in texts.TextSource.model_fields})


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


def _holds_chats(source: TextSource) -> bool:
    return not isinstance(next(load_documents(source), ""), str)
