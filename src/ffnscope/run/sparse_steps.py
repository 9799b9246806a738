"""Steps of contextual sparsity that a run and the commands have in common, told to a reporter."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, NotAvailableError, UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.offload import is_offloaded
from ffnscope.io import hash_json, read_state, read_tensors, write_csv, write_json
from ffnscope.report.card_plot import plot_card
from ffnscope.report.sparse_plots import plot_quality
from ffnscope.run.progress import LOG, QUIET_SECONDS, Reporter, Update
from ffnscope.run.steps import discard_damaged
from ffnscope.saving import writing
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_curve import CurveOptions, card_curve, check_densities, lines_of
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.card_options import CardOptions, CardTarget, CardTexts, ParameterTarget
from ffnscope.sparse.choose import check_certificate
from ffnscope.sparse.costs import UNIT
from ffnscope.sparse.evaluation import FormRow
from ffnscope.sparse.fit import OnStep, check_readable, fit_card
from ffnscope.sparse.rivals import USUAL, check_rivals
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.site_params import check_predictor_params
from ffnscope.sparse.split import split_documents
from ffnscope.sparse.traces import Traces, read_traces
from ffnscope.sparse.tracing import TraceOptions, check_traces, trace, traces_size
from ffnscope.types import FFNSite
from ffnscope.unchanged import while_unchanged


def traced(
    loaded: LoadedModel,
    windows: Windows,
    folder: Path,
    label: str,
    reporter: Reporter,
    options: TraceOptions,
    sites: Sequence[FFNSite] | None = None,
) -> Traces:
    """Trace a text, with its size told before; traces that are there are read, or made again where they are damaged."""
    if folder.exists():
        _discard_damaged(reporter, folder)
    if not folder.exists():
        size = traces_size(loaded.model, windows, sites)
        reporter.say(f"traces of {label}: {size / 2**30:.2f} GiB in {folder}, removed at the end")
    with reporter.task(f"trace {label}", "FFNs") as update:
        return trace(loaded.model, windows, folder, sites=sites, options=options, on_round=update)


def _discard_damaged(reporter: Reporter, folder: Path) -> None:
    """Delete traces of which a file cannot be read, and say so."""
    try:
        for file in read_traces(folder).files.values():
            _check(file)
    except (ArtifactError, ValueError) as error:
        reporter.say(f"{error} These traces are deleted, and made again.")
        with writing(folder):
            shutil.rmtree(folder)


@while_unchanged
def _check(file: Path) -> None:
    """Raise ArtifactError for a damaged file of traces, which is read as a whole."""
    read_tensors(file)


@dataclass(frozen=True, slots=True, eq=False)
class CardJob:
    """A card to make, and a curve around it; what is found on the way lies in a folder, from which it goes on.

    Attributes:
        loaded: model and tokenizer.
        sites: FFNs to trace.
        rule: predictor and policy.
        target: what is wanted.
        options: certificate, allocation, batch size.
        windows: the text that calibrates.
        second: another text.
        densities: of the curve; empty for none.
        against: rows beside the rule there.
        seed: splits the documents.
        max_bytes: of the traces of a text.
        model_hash: of the weights; only where something is made, since it takes time.
    """

    loaded: LoadedModel
    sites: Sequence[FFNSite]
    rule: SelectionRule
    target: CardTarget
    options: CardOptions
    windows: Windows
    second: Windows | None = None
    densities: tuple[float, ...] = ()
    seed: int = 0
    max_bytes: int = TraceOptions().max_bytes
    model_hash: str = ""
    against: tuple[str, ...] = USUAL

    @property
    def key(self) -> str:
        """Hash of all that the card depends on."""
        options = asdict(replace(self.options, batch_size=1, checkpoint=None, on_epoch=None))
        second = None if self.second is None else self._text_key(self.second)
        target = [type(self.target).__name__, asdict(self.target)]
        return hash_json([UNIT, self._text_key(self.windows), second, self.rule.identity(), target, options])

    @property
    def texts(self) -> list[Windows]:
        """Those that are traced."""
        return [self.windows, *([] if self.second is None else [self.second])]

    @property
    def hashes(self) -> dict[str, str]:
        """What it is made from, by name."""
        second = {} if self.second is None else {"the second text": self.second.hash}
        return {"the model": self.model_hash, "the calibration text": self.windows.hash, **second}

    def check(self) -> None:
        """Refuse what cannot work before any work.

        Raises:
            UsageError: too few documents for a split or for the certificate, traces that are too large, impossible
                densities or rows of the curve, a prompt as long as the windows, or a predictor's parameter of an FFN
                that is not there.
            NotAvailableError: an FFN that cannot be traced, or that the predictor is not for; weights that are
                not in memory.
            ArtifactError: a file that a parameter names is not there.
        """
        check_in_memory(self.loaded)
        check_densities(self.rule, self.densities)
        check_rivals(self.against, self.densities, self.sites, self.rule.prompt)
        check_readable(self.rule, self.options, self.sites)
        check_predictor_params(self.rule, self.loaded.model, self.sites)
        if isinstance(self.target, ParameterTarget):
            self.rule.check_parameter(self.target.value)
        for text in self.texts:
            _check_prompt(text, self.rule.prompt)
            check_traces(self.loaded.model, text, self.sites, self._trace_options)
        if self.options.certify is not None:
            n_documents = len(split_documents(self.windows.document, self.seed)["calibrate"])
            check_certificate(self.options.certify, self.target, n_documents)

    def fit(self, folder: Path, reporter: Reporter) -> SparsityCard:
        """Trace, fit and measure; a card that an earlier call left in ``folder`` is read."""
        path = folder / f"card_{self.key[:16]}.json"
        discard_damaged(reporter, path, read_card)
        if path.exists():
            return read_card(path)
        traces = self._traces(folder, reporter)
        held = None if self.second is None else self._traced(self.second, folder, "the second text", reporter)
        texts = CardTexts(self.windows, held, self.second)
        options = replace(self.options, checkpoint=folder / "fits", on_epoch=_Epochs(reporter).told)
        with _tasks(reporter) as on_step:
            card, _ = fit_card(
                self.loaded.model, traces, self.rule, self.target, options=options, texts=texts, on_step=on_step
            )
        write_card(path, card, overwrite=True)
        return card

    def curve(self, card: SparsityCard, folder: Path, reporter: Reporter) -> list[FormRow]:
        """Measure the curve around a card; none for no densities."""
        if not self.densities:
            return []
        traces, state = self._traces(folder, reporter), folder / "curve.json"
        discard_damaged(reporter, state, read_state)
        options = CurveOptions(self.options.batch_size, state, self.against)
        with reporter.task("curve", "steps") as update:
            return card_curve(
                self.loaded.model, traces, card, self.windows, self.densities, options=options, on_step=update
            )

    @property
    def _trace_options(self) -> TraceOptions:
        return TraceOptions(batch_size=self.options.batch_size, max_bytes=self.max_bytes, seed=self.seed)

    def _traces(self, folder: Path, reporter: Reporter) -> Traces:
        return self._traced(self.windows, folder, "the text", reporter)

    def _traced(self, windows: Windows, folder: Path, label: str, reporter: Reporter) -> Traces:
        path = folder / f"traces_{self._text_key(windows)[:16]}"
        return traced(self.loaded, windows, path, label, reporter, self._trace_options, self.sites)

    def _text_key(self, windows: Windows) -> str:
        names = [site.name for site in self.sites]
        return hash_json([self.model_hash, windows.hash, windows.document.tolist(), names, self.seed])


def check_in_memory(loaded: LoadedModel) -> None:
    """Raise NotAvailableError for a model whose weights are not in memory."""
    source = loaded.source
    offloaded = source.device_map is not None and any(map(is_offloaded, loaded.model.parameters()))
    if source.stream is not None or offloaded:
        raise NotAvailableError(
            f"contextual sparsity fits and measures on weights in memory, and {source.model_id} has them elsewhere "
            "(stream, or device_map). Load it without these, on a machine that holds it, or leave contextual "
            "sparsity out."
        )


def _check_prompt(windows: Windows, prompt: int) -> None:
    """Raise UsageError where no window has a token to predict after its prompt."""
    if prompt and windows.length < prompt + 2:
        raise UsageError(
            f"a prompt of {prompt} tokens leaves nothing to predict in windows of {windows.length} tokens "
            f"({windows.source}). Give longer windows (--max-length, calibration.max_length), or a shorter prompt "
            "(predictor parameter prompt)."
        )


class _Epochs:
    """Tells the epochs of predictors that are trained: each in the log, on the terminal one every few seconds."""

    def __init__(self, reporter: Reporter):
        self._reporter, self._last = reporter, time.perf_counter()

    def told(self, site: FFNSite, done: int, most: int, missed: float) -> None:
        """See `OnSiteEpoch`."""
        text = f"train the predictor of {site.name}: epoch {done} of at most {most}, missed mass {missed:.4f}"
        now = time.perf_counter()
        if now - self._last < QUIET_SECONDS:
            LOG.info(text)
            return
        self._last = now
        self._reporter.say(text)


_TASKS = {
    "fit": ("fit and calibrate", "FFNs"),
    "choose": ("choose by the loss", "batches"),
    "measure": ("measure the card", "FFNs"),
    "loss": ("loss with the card", "batches"),
}


@contextlib.contextmanager
def _tasks(reporter: Reporter) -> Generator[OnStep]:
    """Yield what tells the stages of `fit_card`, each as a task that ends when the next one begins."""
    with contextlib.ExitStack() as stack:
        told: dict[str, Update] = {}

        def on_step(stage: str, done: int, total: int) -> None:
            if stage not in told:
                stack.close()
                told[stage] = stack.enter_context(reporter.task(*_TASKS[stage]))
            told[stage](done, total)

        yield on_step


def write_curve(rows: Sequence[FormRow], files: Sequence[Path]) -> None:
    """Write a curve as CSV and JSON."""
    flat = [row.flat() for row in rows]
    write_csv(files[0], flat)
    write_json(files[1], {"rows": flat})


def card_plots(folder: Path, rows: Sequence[FormRow]) -> list[Path]:
    """The files that `draw_card_plots` writes."""
    names = ("card.png", *(("curve.png", "curve_bytes.png") if lines_of(rows) else ()))
    return [folder / name for name in names]


def draw_card_plots(folder: Path, card: SparsityCard, rows: Sequence[FormRow], title: str) -> None:
    """Draw a card by layer, and its curve against density and against bytes."""
    plot_card(card, folder / "card.png", title)
    if lines := lines_of(rows):
        plot_quality(lines, "density", folder / "curve.png", title)
        plot_quality(lines, "bytes_share", folder / "curve_bytes.png", title)
