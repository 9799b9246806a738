"""The command answer: top-k or threshold, and which k, for one or several models on several texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Out, Overwrite, check_folder_output, tell_changes, unfinished
from ffnscope.cli.groups import grouped
from ffnscope.cli.sparse_options import MAX_TRACES, MaxTraces, params_of, trace_bytes
from ffnscope.errors import UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import hash_json, read_state, write_state, write_text
from ffnscope.report.answer_table import answer_markdown, print_answer, write_answer
from ffnscope.run.machine import library_bytes
from ffnscope.run.outputs import versions
from ffnscope.run.progress import Reporter
from ffnscope.run.seconds import seconds_per_token
from ffnscope.run.sparse_estimate import answer_lines, answer_work, print_sparse_estimate, probe_answer
from ffnscope.run.sparse_steps import check_in_memory, traced
from ffnscope.run.steps import discard_damaged
from ffnscope.run.switches import bounds_of
from ffnscope.run.texts import SHIPPED_TEXTS
from ffnscope.run.windows import describe_windows
from ffnscope.sparse.answer import answer
from ffnscope.sparse.answer_rows import Answer, AnswerOptions, Domain
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.card_options import parse_target
from ffnscope.sparse.rule import DEFAULTS
from ffnscope.sparse.tracing import TraceOptions, check_traces

UNFINISHED = "answer.part"
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Hub ids, directories, .gguf files or package:DIST.")
]


@dataclass(frozen=True, slots=True)
class DomainChoice:
    """The texts that are compared, and how much is read of each."""

    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text domain, two or more; all shipped ones without.")
    ] = None
    num_samples: Annotated[int, typer.Option("--num-samples", help="Windows of each text to calibrate on.")] = 96
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per window.")] = 128
    held_out_samples: Annotated[int, typer.Option(help="Held-out windows of each text to measure perplexity on.")] = 32
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows per forward.")] = 4
    seed: Annotated[int, typer.Option(help="Seed that chooses the windows.")] = 42
    max_traces: MaxTraces = MAX_TRACES

    def texts(self) -> dict[str, tuple[opt.TextChoice, opt.TextChoice]]:
        """Name -> windows to calibrate on, and held-out ones; raises for one that cannot be read, or one alone."""
        names = tuple(self.text or SHIPPED_TEXTS)
        if len(set(names)) < 2:
            raise UsageError(f"an answer compares text domains; got {', '.join(names)}. Give two --text or more.")
        if self.held_out_samples < 1:
            raise UsageError(f"--held-out-samples must be at least 1; got {self.held_out_samples}.")
        found: dict[str, tuple[opt.TextChoice, opt.TextChoice]] = {}
        for name in dict.fromkeys(names):
            one = opt.TextChoice(name, None, None, self.num_samples, self.max_length, self.batch_size, self.seed)
            found[name] = one, replace(one, num_samples=self.held_out_samples)
            one.check_calibration()
            found[name][1].check_held_out()
        return found


@grouped
def answer_command(
    *,
    models: Models,
    out: Out,
    target: Annotated[
        str, typer.Option(help="What each rule is calibrated to: recall=, missed_mass=, density= or relative_error=.")
    ] = "recall=0.95",
    wanted: Annotated[
        float, typer.Option(help="Recall is of the fewest channels that miss this share; 0: of all that are not zero.")
    ] = WantedChannels().share,
    predictor: Annotated[str, typer.Option(help="What scores the channels of a token.")] = "low_bit",
    predictor_param: Annotated[
        list[str] | None, typer.Option("--predictor-param", help="NAME=VALUE of the predictor; repeatable.")
    ] = None,
    choice: DomainChoice,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Top-k or threshold, and which k? A page for each MODEL and all texts: OUT/answer.md and a JSON file per model.

    Top-k, threshold and nucleus are calibrated in every FFN and text to the target, and measured on held-out documents:
    at their own densities, all at the density of top-k, and with the parameters of another text. An interrupted call
    goes on with the traces that are complete, and with the next model after those that are answered.
    """
    check_folder_output(out, overwrite, UNFINISHED)
    asked = parse_target(target)
    if not isinstance(asked, Target):
        raise UsageError(f"each rule is calibrated in every FFN by itself; --target {target} is for sparsify.")
    limit = trace_bytes(choice.max_traces)
    params = {**DEFAULTS.get(predictor, {}), **params_of("--predictor-param", predictor_param)}
    options = AnswerOptions(asked, wanted or None, predictor, params, choice.batch_size)
    texts = choice.texts()
    _check_labels(models)
    reporter = Reporter()
    if dry_run:
        libraries = library_bytes()  # before a model is loaded
        for model in models:
            _estimate(model, loading.open(reporter, model, only_estimate=True), texts, (options, limit), libraries)
        return
    with unfinished(out / UNFINISHED) as part:
        tracing = TraceOptions(batch_size=options.batch_size, max_bytes=limit)
        pages = [_page(model, loading, texts, (options, tracing), part, out, reporter) for model in models]
        write_text(out / "answer.md", "\n".join(pages))


def _label(model: str) -> str:
    """Name of the files of a model."""
    return model.removeprefix("package:").strip("/").replace("/", "_")


def _check_labels(models: list[str]) -> None:
    """Raise UsageError for two models whose files would have one name."""
    labels = [_label(model) for model in models]
    for model, label in zip(models, labels, strict=True):
        if labels.count(label) > 1:
            raise UsageError(f"{model} is given twice, or another MODEL has the same file name {label}.json.")


def _estimate(
    model: str,
    loaded: LoadedModel,
    texts: dict[str, tuple[opt.TextChoice, opt.TextChoice]],
    asked: tuple[AnswerOptions, int],
    libraries: int,
) -> None:
    """Print what an answer for one model would take."""
    check_in_memory(loaded)
    (options, limit), sites = asked, find_sites(loaded.model)
    read = {name: (one.calibration(loaded), other.held_out(loaded)) for name, (one, other) in texts.items()}
    for one, _ in read.values():
        check_traces(loaded.model, one, sites, TraceOptions(batch_size=options.batch_size, max_bytes=limit))
    texts_read = [one for one, _ in read.values()]
    probed = probe_answer(loaded, sites, texts_read, options)
    lines = answer_lines(loaded, sites, read, probed, seconds_per_token(loaded.model, sites))
    work = answer_work(loaded, sites, texts_read, probed, options.batch_size)
    print_sparse_estimate(f"answer {model}", lines, bounds_of(loaded, sites, work, libraries), OUT)


def _page(
    model: str,
    loading: opt.Loading,
    texts: dict[str, tuple[opt.TextChoice, opt.TextChoice]],
    asked: tuple[AnswerOptions, TraceOptions],
    part: Path,
    out: Path,
    reporter: Reporter,
) -> str:
    options, tracing = asked
    loaded = loading.open(reporter, model)
    check_in_memory(loaded)
    label, known = _label(model), weights_hash(loaded.model)
    read = {name: (one.calibration(loaded), other.held_out(loaded)) for name, (one, other) in texts.items()}
    hashes = {f"the calibration text {name} of {label}": one.hash for name, (one, _) in read.items()}
    tell_changes(part, {f"the model {label}": known, **hashes}, reporter)
    done, key = part / f"{label}.json", _key(known, read, options)
    discard_damaged(reporter, done, read_state)
    if done.exists() and (told := read_state(done)).get("key") == key and (out / f"{label}.json").exists():
        reporter.say(f"{model} was answered before the interrupt: {out / label}.json")
        return told["page"]
    domains: dict[str, Domain] = {}
    for name, (one, held_out) in read.items():
        folder = part / f"traces_{hash_json([known, one.hash, one.document.tolist()])[:16]}"
        domains[name] = Domain(traced(loaded, one, folder, name, reporter, tracing), held_out)
    found_answer = _answer(loaded, domains, options, reporter)
    OUT.print(Text(f"{model}: top-k or threshold, and which k?", style="bold"))
    print_answer(found_answer, OUT)
    made_from = _made_from(loaded, known, read, next(one.seed for one, _ in texts.values()))
    write_answer(out / f"{label}.json", found_answer, made_from)
    page = answer_markdown(found_answer, f"{model}: top-k or threshold, and which k?", _sentences(made_from))
    write_state(done, {"key": key, "page": page})
    return page


def _made_from(loaded: LoadedModel, known: str, read: dict[str, tuple[Windows, Windows]], seed: int) -> dict[str, Any]:
    """What an answer depends on, beside what was asked."""
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    return {
        "versions": versions(),
        "model": {**loaded.facts, "weights_hash": known, "dtype": dtype},
        "texts": {
            name: {"calibration": describe_windows(one), "perplexity": describe_windows(held)}
            for name, (one, held) in read.items()
        },
        "seed": seed,
    }


def _sentences(made_from: dict[str, Any]) -> list[str]:
    """The same in words."""
    model, told = made_from["model"], ", ".join(f"{name} {value}" for name, value in made_from["versions"].items())
    found = [f"{told}; weights {model['weights_hash'][:16]} in {model['dtype']}; seed {made_from['seed']}"]
    for name, parts in made_from["texts"].items():
        one, held = (
            f"{part['windows']} windows of {part['length']} tokens ({part['text']}, {part['hash'][:16]})"
            for part in (parts["calibration"], parts["perplexity"])
        )
        found.append(f"{name}: {one} to fit, calibrate and measure on, by document; {held} for the perplexity")
    return found


def _key(known: str, read: dict[str, tuple[Windows, Windows]], options: AnswerOptions) -> str:
    """Hash of all that an answer depends on, from that of the weights."""
    texts = {name: [[one.hash, one.document.tolist()] for one in both] for name, both in read.items()}
    return hash_json([known, texts, asdict(replace(options, batch_size=1))])


def _answer(loaded: LoadedModel, domains: dict[str, Domain], options: AnswerOptions, reporter: Reporter) -> Answer:
    steps = ("calibrating", "measuring", "perplexity")
    n_sites = len(next(iter(domains.values())).traces.sites)
    with reporter.task("calibrate and measure", "steps") as update:

        def on_step(what: str, done: int, total: int) -> None:
            update(steps.index(what) * n_sites + done * n_sites // total, len(steps) * n_sites)

        return answer(loaded.model, domains, options=options, on_step=on_step)
