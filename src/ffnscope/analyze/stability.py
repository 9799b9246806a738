"""Would another calibration rank the channels alike? Repeats over seeds and texts, with intervals by document.

The interval is that of the agreement of two calibrations on documents drawn anew and independently, by the
delete-a-group jackknife (see `ffnscope.analyze.jackknife`), the same way for every metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ffnscope.analyze.agreement import Agreement, agreement
from ffnscope.analyze.jackknife import LeftOut, jackknife_interval
from ffnscope.analyze.repeat_passes import Method, is_jackknifed
from ffnscope.analyze.repeats import Repeat
from ffnscope.errors import UsageError
from ffnscope.types import Scores

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Stability:
    """Agreement of one metric between two calibrations.

    Attributes:
        metric: the metric.
        first: label of one calibration.
        second: label of the other.
        value: agreement of the two score tables.
        spearman_interval: 95 % interval over documents. None where there is none (see ``method``), or where the scores
            without some group are constant. For a metric that reads no text it is the value alone.
        jaccard_interval: likewise.
        method: how the intervals were made, or why there are none.
        documents: number of documents of the two calibrations.
        groups: number of groups of documents that were left out in turn.
    """

    metric: str
    first: str
    second: str
    value: Agreement
    spearman_interval: Interval | None
    jaccard_interval: Interval | None
    method: Method
    documents: tuple[int, int]
    groups: tuple[int, int]


def stability(repeats: Mapping[str, Repeat], on_pair: Callable[[int, int], None] | None = None) -> list[Stability]:
    """Compare every pair of calibrations under every metric, with intervals over documents.

    Args:
        repeats: label -> scores of a calibration, and without each group of its documents (see `repeat_scores`).
        on_pair: called with (comparisons done, comparisons in all).

    Raises:
        UsageError: fewer than two calibrations, or calibrations with other metrics or sites than the first.
    """
    if len(repeats) < 2:
        raise UsageError("stability needs at least two calibrations: other seeds, or other texts.")
    first = next(iter(repeats.values()))
    for label, one in repeats.items():
        if one.whole.keys() != first.whole.keys():
            raise UsageError(
                f"calibration {label!r} was scored by {', '.join(one.whole)}, another by {', '.join(first.whole)}; "
                "score all by the same metrics."
            )
    asked = [(metric, *pair) for metric in first.whole for pair in combinations(repeats, 2)]
    rows: list[Stability] = []
    for metric, a, b in asked:
        rows.append(_compare(metric, (a, b), (repeats[a], repeats[b])))
        if on_pair:
            on_pair(len(rows), len(asked))
    return rows


def stability_rows(rows: Sequence[Stability]) -> list[dict[str, Any]]:
    """Flat rows for CSV and JSON."""
    return [
        {
            "metric": row.metric,
            "first": row.first,
            "second": row.second,
            "spearman": row.value.spearman,
            "spearman_low": row.spearman_interval[0] if row.spearman_interval else None,
            "spearman_high": row.spearman_interval[1] if row.spearman_interval else None,
            "top1_jaccard": row.value.jaccard,
            "top1_jaccard_low": row.jaccard_interval[0] if row.jaccard_interval else None,
            "top1_jaccard_high": row.jaccard_interval[1] if row.jaccard_interval else None,
            "interval_method": row.method,
            "documents_first": row.documents[0],
            "documents_second": row.documents[1],
            "groups_first": row.groups[0],
            "groups_second": row.groups[1],
        }
        for row in rows
    ]


def _compare(metric: str, labels: tuple[str, str], repeats: tuple[Repeat, Repeat]) -> Stability:
    a, b = (repeat.whole[metric] for repeat in repeats)
    value = agreement(a, b)
    method = repeats[0].methods[metric]
    if is_jackknifed(method):
        method = repeats[1].methods[metric]  # the same, or the reason why there is none
    spearman: Interval | None = None
    jaccard: Interval | None = None
    if is_jackknifed(method):
        left = [_without(metric, repeats[0], b), _without(metric, repeats[1], a)]
        spearman = _interval(value.spearman, [[f.spearman for f in one] for one in left], repeats, (-1.0, 1.0))
        jaccard = _interval(value.jaccard, [[f.jaccard for f in one] for one in left], repeats, (0.0, 1.0))
    elif method == "no text":
        spearman = None if value.spearman is None else (value.spearman, value.spearman)
        jaccard = (value.jaccard, value.jaccard)
    documents = repeats[0].n_documents, repeats[1].n_documents
    groups = len(repeats[0].shares), len(repeats[1].shares)
    return Stability(metric, *labels, value, spearman, jaccard, method, documents, groups)


def _without(metric: str, repeat: Repeat, other: Scores) -> list[Agreement]:
    """Agreement of a calibration without each group with another, whole one."""
    return [agreement(scores[metric], other) for scores in repeat.without]


def _interval(
    value: float | None,
    left_out: Sequence[Sequence[float | None]],
    repeats: tuple[Repeat, Repeat],
    bounds: Interval,
) -> Interval | None:
    known = [[v for v in values if v is not None] for values in left_out]
    if value is None or [len(k) for k in known] != [len(values) for values in left_out]:
        return None
    first, second = (LeftOut(k, repeat.shares) for k, repeat in zip(known, repeats, strict=True))
    return jackknife_interval(value, first, second, bounds)
