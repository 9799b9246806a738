"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import ValidationError

from ffnscope.analyze.levels import CoreRule, needs_core
from ffnscope.analyze.question import Question
from ffnscope.calibrate.forward import check_windows
from ffnscope.calibrate.text import TextSource, check_text, load_windows
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError, unknown_name
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model, read_token
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_stats
from ffnscope.registry import METRICS, import_own
from ffnscope.run.defaults import RANKING
from ffnscope.run.document import DocumentError, parse_value
from ffnscope.run.explain import explain
from ffnscope.run.metric_arguments import parse_arguments
from ffnscope.run.progress import Reporter
from ffnscope.run.switches import load_to_estimate
from ffnscope.run.texts import held_out_split
from ffnscope.scoring import check_reference

Model = Annotated[str, typer.Argument(help="Hub id, directory, .gguf file, or package:DIST (a GGUF in a package).")]
Tracked = Annotated[list[str] | None, typer.Option("--tracked", help="Pattern of layers to score; repeatable.")]


@dataclass(frozen=True, slots=True)
class Loading:
    """Where a model comes from, and how it is loaded."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto"
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")] = None
    device_map: Annotated[str | None, typer.Option(help="Placement: auto, balanced, sequential or a device.")] = None
    max_memory: Annotated[
        list[str] | None, typer.Option(help="Limit for --device-map, 0=20GiB or cpu=60GiB; repeatable.")
    ] = None
    offload_folder: Annotated[str | None, typer.Option(help="Folder for weights that --device-map puts on disk.")] = (
        None
    )
    stream: Annotated[
        str | None,
        typer.Option(
            help="Read weights block by block, for models that do not fit; device, cpu or disk: where states wait."
        ),
    ] = None
    cache_dir: Annotated[str | None, typer.Option(help="Folder of the hub's files.")] = None
    token_env: Annotated[str | None, typer.Option(help="Variable that holds the hub's token, if not HF_TOKEN.")] = None
    offline: Annotated[bool, typer.Option("--offline", help="Use only files that are in the cache already.")] = False
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Also load weights that are pickle files.")] = (
        False
    )

    def source(self, model: str) -> ModelSource:
        """Translate for the loader; raises UsageError or ModelError for what cannot be."""
        return ModelSource(
            model,
            self.revision,
            self.dtype,
            self.device,
            self.device_map,
            self.trust_remote_code,
            max_memory=None if self.max_memory is None else dict(map(_limit, self.max_memory)),
            offload_folder=self.offload_folder,
            cache_dir=self.cache_dir,
            token=read_token(self.token_env),
            offline=self.offline,
            allow_pickle=self.allow_pickle,
            stream=cast("Any", self.stream),
        )

    def open(self, reporter: Reporter, model: str, *, only_estimate: bool = False) -> LoadedModel:
        """Load a model with a progress line; ``only_estimate``: one that does not fit comes without its weights."""
        with reporter.task(f"load {model}", "models"):
            return (load_to_estimate if only_estimate else load_model)(self.source(model))


def _limit(text: str) -> tuple[str, str]:
    place, equals, limit = text.partition("=")
    if not (place and equals and limit):
        raise UsageError(f"--max-memory {text!r} is not DEVICE=SIZE, for example 0=20GiB or cpu=60GiB.")
    return place, limit


@dataclass(frozen=True, slots=True)
class Inputs:
    """Metrics with their parameters, and what some of them need beyond text and weights, checked against each other.

    Raises:
        UsageError: a metric needs a reference model and none is given, or the other way round; or the core fraction is
            outside (0, 1].
    """

    params: Mapping[str, Mapping[str, Any]]
    core_fraction: float = CoreRule().fraction
    reference: str | None = None
    background: Path | None = None

    def __post_init__(self) -> None:
        contrast = [name for name, params in self.params.items() if params.get("teleport") == "contrast"]
        if contrast and self.background is None:
            raise UsageError(
                f"metric {contrast[0]!r} with teleport=contrast compares two texts: score it on the other one with "
                "--out FOLDER, and give --background FOLDER/statistics.safetensors."
            )
        if self.background is not None and not contrast:
            raise UsageError("--background would do nothing: no metric here has teleport=contrast. Leave it out.")
        needy = [name for name in self.params if "reference" in METRICS.get(name).inputs]
        if needy and self.reference is None:
            raise UsageError(f"metric {needy[0]!r} needs the model before fine-tuning: give --reference MODEL.")
        if self.reference is not None and not needy:
            raise UsageError(f"--reference {self.reference} would do nothing: no metric here reads it. Leave it out.")
        _ = self.rule  # refuses an impossible fraction now

    @property
    def rule(self) -> CoreRule:
        """What the supernode core is."""
        return CoreRule(fraction=self.core_fraction)

    def question(self, loaded: LoadedModel, tracked: list[str] | None = None) -> Question:
        """Find the FFNs and load the reference model, as the scored one was loaded."""
        sites = find_sites(loaded.model, tracked)
        background = None if self.background is None else read_stats(self.background)[0]
        if self.reference is None:
            return Question(loaded.model, sites, self.params, self.rule, background=background)
        before = load_model(replace(loaded.source, model_id=self.reference, revision=None)).model
        check_reference(before, sites)
        return Question(loaded.model, sites, self.params, self.rule, before, background)


@dataclass(frozen=True, slots=True)
class MetricOptions:
    """Parameters of the metrics, what some of them need beyond text and weights, and modules with metrics of one's own.

    Raises:
        UsageError: a module cannot be imported.
    """

    param: Annotated[
        list[str] | None, typer.Option("--param", help="Metric parameter, METRIC.NAME=VALUE; repeatable.")
    ] = None
    core_fraction: Annotated[
        float, typer.Option(help="Share of each FFN that is the core, for metrics that need one.")
    ] = CoreRule().fraction
    reference: Annotated[str | None, typer.Option(help="Model before fine-tuning, for delta_alignment.")] = None
    background: Annotated[
        Path | None, typer.Option(help="Statistics that score wrote for another text, for teleport=contrast.")
    ] = None

    module: Annotated[
        list[str] | None, typer.Option("--module", help="Import this module, which registers metrics; repeatable.")
    ] = None

    def __post_init__(self) -> None:
        for name in self.module or ():
            import_own(name)

    def inputs(self, context: typer.Context, metrics: list[str], seed: int) -> Inputs:
        """Check all of it for these metrics; raises UsageError, also for an option that no metric reads."""
        found = Inputs(self.params(metrics, seed), self.core_fraction, self.reference, self.background)
        if given(context, "core_fraction") and not needs_core(found.params):
            raise UsageError("--core-fraction would do nothing: no metric here reads the supernode core. Leave it out.")
        return found

    def params(self, metrics: list[str], seed: int) -> dict[str, dict[str, Any]]:
        """Parameters of the metrics. Those that draw random numbers draw with ``seed``, unless --param says another."""
        return metric_params(self.param, metrics, seed)


def refuse_useless(context: typer.Context, beside: str, useless: Iterable[str]) -> None:
    """Raise UsageError when options are given that have no meaning ``beside`` another one and its reason."""
    found = ", ".join(f"--{name.replace('_', '-')}" for name in useless if given(context, name))
    if found:
        raise UsageError(f"{found} would do nothing with {beside}. Leave it out.")


def given(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A text and the windows to cut from it.

    Raises:
        UsageError: a number is too small.
    """

    text: Annotated[str, typer.Option("--text", help="Shipped corpus, .txt, .jsonl, folder, or hub dataset.")] = "sotu"
    split: Annotated[str | None, typer.Option(help="Split of the text.")] = None
    mix: Annotated[
        list[str] | None, typer.Option("--mix", help="Further text, in equal parts with the first; can be repeated.")
    ] = None
    num_samples: Annotated[int, typer.Option("--num-samples", help="Token windows.")] = RANKING.windows
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per window.")] = RANKING.length
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Windows per forward; changes memory, not results.")
    ] = 4
    seed: Annotated[int, typer.Option(help="Seed that chooses the windows; also of metrics that draw.")] = 42

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("max_length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")

    def check_calibration(self) -> None:
        """Raise now when the text is missing or not readable; windows are cut once a tokenizer is there."""
        check_text(self.calibration_source)

    def check_held_out(self) -> None:
        """Raise now when the held-out text is missing or not readable."""
        check_text(self._held_out())

    def calibration(self, loaded: LoadedModel) -> Windows:
        """Windows to calibrate on: of the split asked for, else of ``train``."""
        return self._windows(self.calibration_source, loaded)

    def held_out(self, loaded: LoadedModel) -> Windows:
        """Windows to evaluate on: of the split asked for, else of the known held-out one."""
        return self._windows(self._held_out(), loaded)

    def repeats(self, seeds: int, texts: list[str]) -> dict[str, TextChoice]:
        """Label -> the same choice with the next seeds, then with other texts; empty when neither is asked for.

        Raises:
            UsageError: fewer seeds than one, or a text that is there already.
        """
        if seeds < 1:
            raise UsageError(f"--repeats must be at least 1, the number of seeds; got {seeds}.")
        every = range(self.seed, self.seed + seeds)
        of = " + ".join(self.names)
        found: dict[str, TextChoice] = {f"{of} seed {s}": replace(self, seed=s) for s in every}
        for text in texts:
            label = f"{text} seed {self.seed}"
            if label in found:
                raise UsageError(f"--repeat-text {text} is there already; name each further text once.")
            found[label] = replace(self, text=text, split=None, mix=None)
        return found if len(found) > 1 else {}

    @property
    def names(self) -> tuple[str, ...]:
        """The text, then those mixed with it."""
        return (self.text, *(self.mix or ()))

    @property
    def calibration_source(self) -> TextSource:
        """The text to calibrate on: the split asked for, else ``train``."""
        mix = tuple(TextSource(name, split=_train_split(name)) for name in self.mix or ())
        return TextSource(self.text, split=self.split or _train_split(self.text), mix=mix)

    def _held_out(self) -> TextSource:
        mix = tuple(TextSource(name, split=held_out_split(name)) for name in self.mix or ())
        return TextSource(self.text, split=self.split or held_out_split(self.text), mix=mix)

    def _windows(self, source: TextSource, loaded: LoadedModel) -> Windows:
        found = load_windows(source, loaded.tokenizer, n=self.num_samples, length=self.max_length, seed=self.seed)
        check_windows(loaded.model, found)
        return found


def _train_split(name: str) -> str | None:
    return None if Path(name).is_file() else "train"


def metric_params(given: list[str] | None, metrics: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """Parse ``METRIC.NAME=VALUE`` options into typed arguments per metric; ``seed`` is for those that have one.

    Raises:
        UsageError: malformed, of a wrong type, missing, or for a metric that is not asked for.
    """
    raw: dict[str, dict[str, Any]] = {m: {"seed": seed} if "seed" in METRICS.get(m).params else {} for m in metrics}
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
    found = {name: _arguments(name, values) for name, values in raw.items()}
    for name, values in found.items():
        METRICS.get(name).needed(values)  # parts of a composite that are unknown
    return found


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
        raise UsageError(f"--param {name}: {explain(first).rstrip('.')}.".replace("?.", "?")) from error
