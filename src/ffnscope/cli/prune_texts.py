"""The texts of prune: what it calibrates on, and which other text, or part of it, the result is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnscope.apply.method import Method
from ffnscope.apply.record import PruningRecord, TextRecipe, text_source
from ffnscope.calibrate.forward import check_windows
from ffnscope.calibrate.pack import Cut
from ffnscope.calibrate.text import HUB_NAMES, TextSource, check_text, load_cut
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.errors import TextError, UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.run.defaults import defaults_of
from ffnscope.run.texts import held_out_split

CURE = "Name a text to measure on (--held-out-text), or pass --no-evaluate."


@dataclass(frozen=True, slots=True)
class HeldOutChoice:
    """The text that the result is measured on."""

    held_out_text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on; default: the test splits of --text and --mix; of your own documents every 8th, "
            "on which is not calibrated."
        ),
    ] = None
    held_out_split: Annotated[str | None, typer.Option(help="Split of --held-out-text.")] = None

    def check(self, context: typer.Context, *, evaluates: bool) -> None:
        """Raise UsageError for options that would do nothing."""
        if not evaluates:
            opt.refuse_useless(context, "--no-evaluate", ("held_out_text", "held_out_split"))
        if self.held_out_text is None:
            opt.refuse_useless(context, "no --held-out-text, whose split it is", ("held_out_split",))

    @property
    def source(self) -> TextSource | None:
        """The text, if one is given."""
        name = self.held_out_text
        if name is None:
            return None
        default = None if Path(name).expanduser().exists() else held_out_split(name) or "test"
        return TextSource(name, split=self.held_out_split or default)


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, and how many windows of which length are cut from it.

    Attributes:
        source: the text.
        n: windows.
        length: tokens per window.
        seed: chooses the windows.
        batch_size: windows at a time.
        least: windows that are enough where the text has fewer than ``n``; None = ``n``.
        grows: whether there are more windows where FFNs are wider, see `enough_windows`.
    """

    source: TextSource
    n: int
    length: int
    seed: int
    batch_size: int
    least: int | None = None
    grows: bool = False

    def windows(self, loaded: LoadedModel, enough: int | None = None) -> Windows:
        """Cut the windows; ``enough`` of them, with ``n`` as the least, where the sample grows.

        Raises:
            UsageError: the model has too few positions for them, or no rows for their token ids.
            TextError: the text is too short.
        """
        cut = Cut(self.n, self.length, seed=self.seed, least=self.least)
        if self.grows and enough is not None:
            cut = replace(cut, n=max(self.n, enough), least=self.n)
        found = load_cut(self.source, loaded.tokenizer, cut)
        check_windows(loaded.model, found)
        return found

    def recipe(self, windows: Windows) -> TextRecipe:
        """How these windows of the sample can be cut again."""
        return TextRecipe(self.source, len(windows), self.length, self.seed, windows.hash)

    @property
    def told(self) -> dict[str, Any]:
        """The sample for a record."""
        return {"n": self.n, "length": self.length, "seed": self.seed, "source": asdict(self.source)}


@dataclass(frozen=True, slots=True)
class PruneTexts:
    """What is calibrated on, and what is measured on.

    Attributes:
        calibration: the calibration text.
        held_out: the other text, or None where nothing is measured.
        told: the held-out text, for the record; where nothing is measured, only how large it would be.
    """

    calibration: Sample
    held_out: Sample | None
    told: Mapping[str, Any]


def calibration_of(context: typer.Context, text: opt.TextChoice, method: Method) -> Sample:
    """The calibration text: what the user gave, and for the rest the defaults of the method."""
    defaults = defaults_of(method.reconstruct)
    mix = text.mix
    if not any(opt.given(context, name) for name in ("text", "mix", "split")):
        mix = list(defaults.mixed_with(text.text))
    grows = method.refits and not opt.given(context, "num_samples")
    n = text.num_samples if opt.given(context, "num_samples") else defaults.windows
    length = text.max_length if opt.given(context, "max_length") else defaults.length
    return Sample(replace(text, mix=mix).calibration_source, n, length, text.seed, text.batch_size, grows=grows)


def texts_of(
    context: typer.Context, text: opt.TextChoice, method: Method, held_out: TextSource | None, *, evaluates: bool
) -> PruneTexts:
    """The texts of a new pruning; ``held_out`` is the one that the user named.

    Raises:
        UsageError: it is not known what to measure on, or it is what is calibrated on.
        TextError: the held-out text is missing or not readable.
    """
    found = calibration_of(context, text, method)
    if not evaluates:
        size = {"n": text.num_samples, "length": text.max_length, "seed": text.seed}
        return PruneTexts(found, None, size)
    decided = any(opt.given(context, name) for name in ("plan", "scores"))
    source, least = held_out, 1
    if source is None:
        parts = [_parted(one, by_document=not decided) for one in found.source.parts]
        source = _joined([judge for _, judge in parts])
        found = replace(found, source=_joined([fit for fit, _ in parts]))
        least = 1 if any(one.part for one in source.parts) else None
    _refuse_same(found.source, source)
    _check(source)
    measured = Sample(source, text.num_samples, text.max_length, text.seed, text.batch_size, least)
    return PruneTexts(found, measured, measured.told)


def texts_again(
    context: typer.Context, text: opt.TextChoice, record: PruningRecord, held_out: TextSource | None, *, evaluates: bool
) -> PruneTexts:
    """The texts of an earlier result; the batch size, a held-out text, and the place of the text may be given.

    Raises:
        UsageError, TextError: see `texts_of`.
    """
    size = text.batch_size if opt.given(context, "batch_size") else record.batch_size
    of = record.held_out
    known = text.calibration_source if record.text is None else record.text.source
    found = Sample(known, of["n"], of["length"], of["seed"], size)
    if not evaluates:
        return PruneTexts(found, None, of)
    source = held_out
    if source is None and "source" in of:
        source = text_source(**of["source"])
        moved = opt.given(context, "text") and source.part is not None
        source = replace(source, name=text.text) if moved else source
    elif source is None:
        source = _joined([_parted(one, by_document=False)[1] for one in known.parts])
    if record.text is not None:
        _refuse_same(known, source)
    _check(source)
    measured = replace(found, source=source, least=1)
    return PruneTexts(found, measured, measured.told)


def _parted(one: TextSource, *, by_document: bool) -> tuple[TextSource, TextSource]:
    """What is calibrated on, and what is measured on: another split of a known text, or other documents."""
    split = held_out_split(one.name)
    if split is not None:
        if one.split == split:
            raise UsageError(
                f"--split {split} is the held-out split of {one.name}, on which the result is measured. Calibrate on "
                "another, or pass --no-evaluate."
            )
        return one, replace(one, split=split)
    path = Path(one.name).expanduser()
    if path.suffix == ".jsonl" and not path.exists():
        raise TextError(f"{one.name} does not exist: no such file or folder.")
    documents = path.is_dir() or path.suffix == ".jsonl"
    if not documents or not by_document:
        why = "" if path.suffix != ".txt" else " (a .txt file is one document, of which none can be held out)"
        raise UsageError(f"{one.name} has no known held-out split to measure on{why}. {CURE}")
    return replace(one, part="fit"), replace(one, part="held_out")


def _joined(parts: list[TextSource]) -> TextSource:
    return replace(parts[0], mix=tuple(parts[1:]))


def _check(source: TextSource) -> None:
    try:
        check_text(source)
    except TextError as error:
        if any(one.part for one in source.parts):
            raise UsageError(f"{error} {CURE}") from error
        raise


def _refuse_same(calibration: TextSource, held_out: TextSource) -> None:
    """Raise UsageError when a text is both calibrated and measured on."""
    for one in calibration.parts:
        for other in held_out.parts:
            if _same(one, other):
                raise UsageError(
                    f"the result would be measured on {other.describe_one()}, on which it is calibrated. {CURE}"
                )


def _same(one: TextSource, other: TextSource) -> bool:
    if {one.part, other.part} == {"fit", "held_out"} and one.name == other.name:
        return False
    paths = [Path(text.name).expanduser() for text in (one, other)]
    if all(path.exists() for path in paths):
        return paths[0].samefile(paths[1]) and (paths[0].is_file() or one.split == other.split)
    return _named(one) == _named(other)


def _named(text: TextSource) -> tuple[Any, ...]:
    name, subset = HUB_NAMES.get(text.name, (text.name, None))
    known = dict(HUB_NAMES.values())
    return name, text.subset or subset or known.get(name), text.split
