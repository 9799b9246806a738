"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from torch import nn

from ffnscope.calibrate.text import TextSource, load_windows
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError, unknown_name
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model
from ffnscope.registry import METRICS
from ffnscope.run.document import DocumentError, parse_value
from ffnscope.run.explain import explain
from ffnscope.run.metric_arguments import parse_arguments
from ffnscope.run.progress import Reporter
from ffnscope.run.texts import held_out_split

Model = Annotated[str, typer.Argument(help="Hub id, directory, .gguf file, or package:DIST (a GGUF in a package).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Text = Annotated[str, typer.Option("--text", help="Shipped corpus, .txt, .jsonl, folder, or hub dataset.")]
Split = Annotated[str | None, typer.Option(help="Split of the text.")]
Samples = Annotated[int, typer.Option("--num-samples", help="Token windows.")]
Length = Annotated[int, typer.Option("--max-length", help="Tokens per window.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Windows per forward; changes memory, not results.")]
Seed = Annotated[int, typer.Option(help="Seed that chooses the windows.")]
Params = Annotated[list[str] | None, typer.Option("--param", help="Metric parameter, METRIC.NAME=VALUE; repeatable.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Out = Annotated[Path, typer.Option("--out", help="Output; must not exist, unless --overwrite.")]

CoreFraction = Annotated[float, typer.Option(help="Share of each FFN that is the core, for metrics that need one.")]
Reference = Annotated[str | None, typer.Option(help="Model before fine-tuning, for delta_alignment.")]


@dataclass(frozen=True, slots=True)
class Extras:
    """What some metrics need beyond text and weights."""

    core_fraction: float = 0.01
    reference: nn.Module | None = None


def open_reference(model: str, source: ModelSource) -> nn.Module:
    """Load the model before fine-tuning, as the scored one was loaded."""
    return load_model(replace(source, model_id=model, revision=None)).model


def open_model(reporter: Reporter, model: str, device: str, dtype: str, trust_remote_code: bool) -> LoadedModel:
    """Load a model with a progress line."""
    source = ModelSource(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    with reporter.task(f"load {model}", "models"):
        return load_model(source)


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A text and the windows to cut from it, as the options of a command say."""

    name: str
    split: str | None
    num_samples: int
    max_length: int
    batch_size: int
    seed: int

    def calibration(self, loaded: LoadedModel) -> Windows:
        """Windows to calibrate on: of the split asked for, else of ``train``."""
        return self._windows(loaded, self.split or (None if Path(self.name).is_file() else "train"))

    def held_out(self, loaded: LoadedModel) -> Windows:
        """Windows to evaluate on: of the split asked for, else of the known held-out one."""
        return self._windows(loaded, self.split or held_out_split(self.name))

    def repeats(self, seeds: int, texts: list[str]) -> Mapping[str, TextChoice]:
        """Label -> the same choice with other seeds, and with other texts."""
        found = {f"{self.name} seed {s}": replace(self, seed=s) for s in range(self.seed, self.seed + seeds)}
        return found | {f"{text} seed {self.seed}": replace(self, name=text, split=None) for text in texts}

    def _windows(self, loaded: LoadedModel, split: str | None) -> Windows:
        source = TextSource(self.name, split=split)
        return load_windows(source, loaded.tokenizer, n=self.num_samples, length=self.max_length, seed=self.seed)


def metric_params(given: list[str] | None, metrics: list[str]) -> dict[str, dict[str, Any]]:
    """Parse ``METRIC.NAME=VALUE`` options into typed arguments per metric.

    Raises:
        UsageError: malformed, of a wrong type, missing, or for a metric that is not asked for.
    """
    raw: dict[str, dict[str, Any]] = {m: {} for m in metrics}
    for item in given or ():
        left, equals, value = item.partition("=")
        name, dot, key = left.partition(".")
        if not (equals and dot and key):
            raise UsageError(f"--param {item!r} is not METRIC.NAME=VALUE, for example random.seed=3.")
        if name not in raw:
            raise unknown_name("metric of --param", name, raw)
        rule = METRICS.get(name)
        if key not in rule.params:
            raise unknown_name(f"parameter of metric {name!r}", key, rule.params)
        raw[name][key] = _value(item, value)
    return {name: _arguments(name, values) for name, values in raw.items()}


def _value(item: str, text: str) -> Any:
    try:
        return parse_value(text)
    except DocumentError as error:
        raise UsageError(f"--param {item}: {error}.") from error


def _arguments(metric: str, values: dict[str, Any]) -> dict[str, Any]:
    try:
        return parse_arguments(METRICS.get(metric), values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join((metric, *map(str, first["loc"])))
        raise UsageError(f"--param {name}: {explain(first)}.") from error
