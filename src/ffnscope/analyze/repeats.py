"""One calibration of several: its scores, and those of the same text without each group of its documents.

Statistics are sums over tokens, so those of a text without a group are the sums of the text minus those of the group.
Where all statistics are vectors, they are kept per group, and one pass over the text is enough. Larger ones (second
moments, histograms, correlations with the core) are only summed up in that pass; one further pass takes them again,
group by group. So never more than the total and one group are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ffnscope.analyze.group_sums import GroupSums, Stats, only, with_core
from ffnscope.analyze.jackknife import GROUPS, document_groups
from ffnscope.analyze.levels import needs_core
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_files import RepeatFiles
from ffnscope.analyze.repeat_passes import Method, finds_cores, interval_methods, is_jackknifed, repeat_passes
from ffnscope.calibrate.collect import PassOptions, collect, join_statistics, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.io import hash_json
from ffnscope.types import FFNSite, Scores

Core = Mapping[FFNSite, Tensor]
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """Scores of one calibration, and of it without each group of documents.

    Attributes:
        whole: metric -> scores.
        without: per group, metric -> scores of the text without it, for the metrics that are jackknifed; empty where
            none is.
        shares: share of the text's tokens that each group holds.
        n_documents: number of documents.
        methods: metric -> how its intervals are made.
    """

    whole: Mapping[str, Scores]
    without: Sequence[Mapping[str, Scores]]
    shares: Sequence[float]
    n_documents: int
    methods: Mapping[str, Method]


def repeat_scores(
    asked: Question,
    windows: Windows,
    *,
    groups: int = GROUPS,
    options: PassOptions | None = None,
    folder: Path | None = None,
    on_batch: OnBatch | None = None,
) -> Repeat:
    """Calibrate on a text and score, and score without each group of its documents.

    Without a group the supernode core is found anew where that needs no further pass, as by the loss proxy (see
    `finds_cores`). Otherwise it is that of the whole text, and the intervals of metrics that read it are conditional on
    that.

    Args:
        asked: model, sites and metrics.
        windows: the text.
        groups: how many groups of documents are left out in turn, at most; see `document_groups`.
        options: sizes of the passes. ``checkpoint`` is not used; ``gradient_windows`` must be None.
        folder: keeps what is done, so that the same call after an interrupt goes on; the caller removes it. None: an
            interrupted call starts again.
        on_batch: called with (tokens done, tokens in all) of all passes.

    Raises:
        UsageError: ``gradient_windows`` is given, which chooses windows of the whole text; fewer than 2 groups; or the
            rule cannot define a core.
        NonFiniteError, DeviceError: see `calibrate`.
    """
    options = replace(options or PassOptions(), checkpoint=None)
    if options.gradient_windows is not None:
        raise UsageError(
            f"gradient_windows = {options.gradient_windows} chooses windows of the whole text, so its documents would "
            "not add up to the calibration on all. Give None, and fewer windows instead."
        )
    masks = document_groups(windows, groups)
    parts = [windows[mask] for mask in masks]
    methods = interval_methods(asked.params, asked.rule, len(parts))
    key = "" if folder is None else _key(asked, windows, masks, options)
    run = _Run(asked, parts, options, RepeatFiles(folder, key), on_batch)
    whole, *without = run.tables([m for m, how in methods.items() if is_jackknifed(how)])
    shares = [part.n_tokens / windows.n_tokens for part in parts]
    return Repeat(whole, without, shares, len(windows.document.unique()), methods)


class _Run:
    """A repeat in progress."""

    def __init__(
        self,
        asked: Question,
        parts: Sequence[Windows],
        options: PassOptions,
        files: RepeatFiles,
        on_batch: OnBatch | None,
    ):
        self.asked = asked
        self.parts = parts
        self.options = options
        self.files = files
        self.passes = repeat_passes(asked.params, asked.rule, len(parts))
        self._on_batch = on_batch
        self._done = 0
        self._total = len(self.passes.named()) * sum(part.n_tokens for part in parts)

    def tables(self, sampled: Sequence[str]) -> list[dict[str, Scores]]:
        """Scores of the whole text, then of the metrics ``sampled`` without each group."""
        tables = self.files.tables()
        count = 1 + (len(self.parts) if sampled else 0)
        if len(tables) >= count:
            return tables[:count]
        first = self._sums("first", self.passes.first, None)
        cores = self._cores(first)
        union = {site: torch.cat([core[site] for core in cores]).unique() for site in cores[0]}
        second = self._sums("core", self.passes.core, union)
        if not tables:
            stats = join_statistics(first.whole(), with_core(second.whole(), union, cores[0]))
            tables = [self.asked.scores(stats, cores[0])]
            self.files.save_table(0, tables[0])
        self._skip(self.parts[: len(tables) - 1], self.passes.again)
        for index in range(len(tables) - 1, count - 1):
            large = self._collect(self.parts[index], self.passes.again, union)
            rest = first.without(index, only(large, self.passes.first))
            of_core = with_core(second.without(index, only(large, self.passes.core)), union, cores[index + 1])
            tables.append(self.asked.scores(join_statistics(rest, of_core), cores[index + 1], metrics=sampled))
            self.files.save_table(index + 1, tables[-1])
            del large, rest, of_core  # the next group needs their memory
        self.files.drop_sums()
        return tables

    def _cores(self, first: GroupSums) -> list[Core]:
        """The core of the whole text, then without each group: found anew if possible; empty where none is needed."""
        asked, rule = self.asked, self.asked.rule
        if not needs_core(asked.params):
            return [{}] * (1 + len(self.parts))
        whole = rule.find(asked.model, first.whole())
        if len(self.parts) < 2 or not finds_cores(asked.params, rule):
            return [whole] * (1 + len(self.parts))
        nothing = only(first.whole(), ())
        return [whole, *(rule.find(asked.model, first.without(i, nothing)) for i in range(len(self.parts)))]

    def _sums(self, name: str, statistics: Sequence[str], core: Core | None) -> GroupSums:
        """Sums of a pass over all groups."""
        sums = self.files.sums(name)
        self._skip(self.parts[: len(sums.groups)], statistics)
        pending = 0
        for part in self.parts[len(sums.groups) :]:
            sums.add(self._collect(part, statistics, core))
            pending += len(part)
            if pending >= self.options.checkpoint_every or len(sums.groups) == len(self.parts):
                self.files.save_sums(name, sums)
                pending = 0
        return sums

    def _collect(self, part: Windows, statistics: Sequence[str], core: Core | None) -> Stats:
        """Statistics of one group, which tell their share of the progress."""

        def tell(done: int, total: int) -> None:
            if self._on_batch:
                self._on_batch(self._done + done * part.n_tokens // total, self._total)

        asked, options = self.asked, self.options
        found = collect(asked.model, part, statistics, sites=asked.sites, core=core, options=options, on_batch=tell)
        self._skip([part], statistics)
        return found

    def _skip(self, parts: Sequence[Windows], statistics: Sequence[str]) -> None:
        """Count groups as done in a pass, if that pass is made at all."""
        self._done += sum(part.n_tokens for part in parts) if statistics else 0


def _key(asked: Question, windows: Windows, masks: Sequence[Tensor], options: PassOptions) -> str:
    """Hash of everything that a repeat depends on."""
    facts = {
        "model": [weights_hash(asked.model), repr(getattr(asked.model, "config", type(asked.model).__name__))],
        "reference": asked.reference and weights_hash(asked.reference),
        "windows": windows.hash,
        "groups": [mask.nonzero().flatten() for mask in masks],
        "sites": [asdict(site) for site in asked.sites],
        "metrics": {name: dict(params) for name, params in asked.params.items()},
        "rule": asdict(asked.rule),
        "sizes": [options.batch_size, options.gradient_length],
    }
    return hash_json(facts)
