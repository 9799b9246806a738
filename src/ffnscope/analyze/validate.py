"""Which ranking to trust on this model: scores against measured loss changes, and perplexity after pruning by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.ablation import Ablation, ablate_channels
from ffnscope.analyze.agreement import spearman
from ffnscope.analyze.jackknife import GROUPS, LeftOut, document_groups, one_sample_interval
from ffnscope.analyze.levels import CoreRule
from ffnscope.analyze.sample import ChannelSample
from ffnscope.calibrate.collect import required_statistics
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.windows import Windows
from ffnscope.display import frame, html_table
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import EvalRow, compare_plans
from ffnscope.plan.build import build_plan
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import FFNSite, PruningPlan, Scores

FLOOR = "random"
LARGE_BYTES = 2**32  # of the sums of one metric
Interval = tuple[float, float]
PerSite = Mapping[FFNSite, Tensor]


@dataclass(frozen=True, slots=True)
class Correlation:
    """Spearman's rank correlation with measured changes; None where one side is constant.

    ``interval`` is the 95 % interval over documents of the held-out text (jackknife over groups of them); None where
    there is a single document or a correlation without some group is not defined. It is about this sample of channels.
    """

    value: float | None
    interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class RankQuality:
    """How well one metric's scores rank the sampled channels by what removing each of them does.

    Attributes:
        metric: the metric.
        loss: all sampled channels together, against the change of the mean token NLL (signed: high = the loss rises).
        loss_within: the same inside each FFN, then averaged over FFNs.
        token: all together, against the mean absolute change of a token's NLL.
        token_within: the same inside each FFN, then averaged.
    """

    metric: str
    loss: Correlation
    loss_within: Correlation
    token: Correlation
    token_within: Correlation


@dataclass(frozen=True, slots=True)
class ValidationOptions:
    """What a validation measures.

    Attributes:
        sample: channels to ablate.
        sparsities: fractions of channels to remove for the perplexities; may be empty.
        allocators: registered rules for the widths.
        batch_size: windows per forward; sets memory, not results.

    Raises:
        UsageError: a sparsity outside (0, 1), or the same one twice.
    """

    sample: ChannelSample = field(default_factory=ChannelSample)
    sparsities: tuple[float, ...] = (0.1, 0.3, 0.5)
    allocators: tuple[str, ...] = ("local", "global")
    batch_size: int = 4

    def __post_init__(self) -> None:
        wrong = [s for s in self.sparsities if not 0 < s < 1]
        if wrong or len(set(self.sparsities)) < len(self.sparsities):
            raise UsageError(
                "sparsities must be distinct and in (0, 1), fractions of channels to remove; got "
                f"{', '.join(f'{s:g}' for s in self.sparsities)}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """The result for several metrics on one model and text.

    Attributes:
        qualities: one per metric, the best pooled correlation with the loss first, ``random`` last.
        between_halves: correlations of the measured changes on one half of the documents with those on the other: no
            score can be expected to do much better on so little text. Named like the fields of `RankQuality`.
        ablation: the measured changes.
        scores: metric -> its scores.
        pruned: (metric, allocator, sparsity) -> perplexity, KL and agreement after pruning.
        dense: the unpruned model on the same text; None where nothing was pruned.
        skipped: metric -> why it has no row.
        source: the held-out text.
    """

    qualities: Sequence[RankQuality]
    between_halves: RankQuality
    ablation: Ablation
    scores: Mapping[str, Scores]
    pruned: Mapping[tuple[str, str, float], EvalRow]
    dense: EvalRow | None
    source: str
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON, one per metric."""
        return [quality_row(one, self.pruned) for one in self.qualities]

    def to_pandas(self) -> Any:
        """The rows as a DataFrame."""
        return frame(self._columns())

    def _repr_html_(self) -> str:
        return html_table(self._columns())

    def _columns(self) -> dict[str, list[Any]]:
        rows = self.rows()
        return {name: [row[name] for row in rows] for name in rows[0]}


def validate(
    model: nn.Module,
    scores: Mapping[str, Scores],
    windows: Windows,
    *,
    options: ValidationOptions | None = None,
    folder: Path | None = None,
    on_tokens: Callable[[str, int, int], None] | None = None,
) -> Validation:
    """Ablate a sample of channels and prune by every metric, on held-out text.

    Args:
        model: the model that was scored; bit-identical afterwards.
        scores: metric -> scores of the same FFNs. ``random`` is added where it is missing.
        windows: text that the scores have not seen.
        options: sizes and sparsities.
        folder: keeps what is measured, so that the same call after an interrupt goes on; the caller removes it.
        on_tokens: called with (stage, tokens run, tokens in all); the stages are "ablate" and "prune".

    Raises:
        UsageError: no scores, scores of different FFNs, or no target in the text.
        NonFiniteError, DeviceError, ArtifactError: see `ablate_channels` and `compare_plans`.
    """
    options = options or ValidationOptions()
    scores = with_floor(model, scores)
    channels = options.sample.draw(stratifier(scores))
    state = {name: folder / f"{name}.json" if folder else None for name in ("ablate", "prune")}

    def tell(stage: str, each: int) -> Callable[[int, int], None]:
        def now(done: int, total: int) -> None:
            if on_tokens is not None:
                on_tokens(stage, done * each, total * each)

        return now

    size: Any = {"batch_size": options.batch_size}
    found = ablate_channels(model, channels, windows, **size, state=state["ablate"], on_tokens=tell("ablate", 1))
    plans = validation_plans(scores, options)
    each = options.batch_size * windows.length * (1 + len(plans))
    given: Any = {**size, "state": state["prune"], "on_batch": tell("prune", each)}
    rows = compare_plans(model, {label(key): plan for key, plan in plans.items()}, windows, **given) if plans else []
    return join_validation(scores, found, plans, rows, windows)


def join_validation(
    scores: Mapping[str, Scores],
    ablation: Ablation,
    plans: Mapping[tuple[str, str, float], PruningPlan],
    rows: Sequence[EvalRow],
    windows: Windows,
) -> Validation:
    """Join what was measured: ``rows`` are those of `compare_plans`, the dense one first, or none."""
    qualities = [rank_quality(name, one.values, ablation, windows) for name, one in scores.items()]
    qualities.sort(key=lambda one: (one.metric == FLOOR, -(one.loss.value if one.loss.value is not None else -2.0)))
    halves = _between_halves(ablation, windows)
    pruned = dict(zip(plans, rows[1:], strict=True))
    dense = rows[0] if rows else None
    return Validation(qualities, halves, ablation, scores, pruned, dense, windows.source)


def computable_metrics(
    sites: Sequence[FFNSite], rule: CoreRule, *, has_reference: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Names of the registered metrics that can be computed for these FFNs, and why the others cannot.

    A metric whose sums take more than 4 GiB is left out as well; ask for it by name.
    """
    found: list[str] = []
    why: dict[str, str] = {}
    for name in METRICS.names():
        metric = METRICS.get(name)
        required = [key for key, p in metric.params.items() if p.default is p.empty]
        if "reference" in metric.inputs and not has_reference:
            why[name] = "it needs the model before fine-tuning (a reference model)"
        elif required:
            why[name] = f"its parameter {required[0]} has no default"
        elif (size := statistics_bytes(sites, required_statistics({name: {}}), rule.size(sites))) > LARGE_BYTES:
            why[name] = f"its sums take {size / 2**30:,.1f} GiB; ask for it by name"
        else:
            found.append(name)
    return found, why


def with_floor(model: nn.Module, scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Add ``random`` where it is missing; raises UsageError for no scores, or scores of different FFNs."""
    if not scores:
        raise UsageError("there are no scores to validate: give at least those of one metric.")
    first = next(iter(scores.values()))
    for name, one in scores.items():
        if one.values.keys() != first.values.keys():
            raise UsageError(f"{name!r} scored other FFNs than {first.metric!r}; score the same layers by all metrics.")
    return {**scores} if FLOOR in scores else {**scores, FLOOR: score(model, list(first.values), FLOOR)}


def stratifier(scores: Mapping[str, Scores]) -> Scores:
    """Scores whose quantiles the sampled channels are drawn from: the first that are not ``random``."""
    return next((one for name, one in scores.items() if name != FLOOR), next(iter(scores.values())))


def validation_plans(
    scores: Mapping[str, Scores], options: ValidationOptions
) -> dict[tuple[str, str, float], PruningPlan]:
    """Plans by metric, allocator and sparsity."""
    return {
        (name, allocator, sparsity): build_plan(one, sparsity, allocator)
        for name, one in scores.items()
        for allocator in options.allocators
        for sparsity in options.sparsities
    }


def label(key: tuple[str, str, float]) -> str:
    """Name of a plan in a comparison."""
    return f"{key[0]} {key[1]} {key[2]:g}"


def rank_quality(metric: str, values: PerSite, ablation: Ablation, windows: Windows) -> RankQuality:
    """Correlate scores, site -> [d_ff], with measured changes, with intervals over the documents of ``windows``."""
    picked = {site: values[site][index].double().cpu() for site, index in ablation.channels.items()}
    masks = document_groups(windows, GROUPS)
    total = int(ablation.n_targets.sum())
    shares = [int(ablation.n_targets[mask].sum()) / total for mask in masks]
    whole = _correlations(picked, ablation, None)
    # a group without any target leaves everything as it is
    left = [_correlations(picked, ablation, ~mask) for mask, share in zip(masks, shares, strict=True) if 0 < share < 1]
    shares = [share for share in shares if 0 < share < 1]
    each = [[one[i] for one in left] for i in range(len(whole))]
    return RankQuality(metric, *(_bounded(*row, shares) for row in zip(whole, each, strict=True)))


def quality_row(one: RankQuality, pruned: Mapping[tuple[str, str, float], EvalRow]) -> dict[str, Any]:
    """Flat row of one metric: correlations with bounds, then a perplexity per allocator and sparsity."""
    row: dict[str, Any] = {"metric": one.metric}
    for name in ("loss", "loss_within", "token", "token_within"):
        found: Correlation = getattr(one, name)
        row[f"spearman_{name}"] = found.value
        row[f"spearman_{name}_low"], row[f"spearman_{name}_high"] = found.interval or (None, None)
    for (metric, allocator, sparsity), measured in pruned.items():
        if metric == one.metric:
            perplexity = next(r for r in measured.results if r.name == "perplexity")
            row[f"perplexity_{allocator}_{sparsity:g}"] = perplexity.value
            row[f"perplexity_{allocator}_{sparsity:g}_stderr"] = perplexity.stderr
    return row


def _between_halves(ablation: Ablation, windows: Windows) -> RankQuality:
    masks = document_groups(windows, 2)
    if len(masks) < 2 or any(int(ablation.n_targets[mask].sum()) == 0 for mask in masks):
        return RankQuality("between halves", *(Correlation(None) for _ in range(4)))
    first, second = masks
    loss, moved = ablation.loss_change(first), ablation.token_change(first)
    found = _correlations(loss, ablation, second)[:2] + _correlations(moved, ablation, second)[2:]
    return RankQuality("between halves", *map(Correlation, found))


def _correlations(values: PerSite, ablation: Ablation, windows: Tensor | None) -> list[float | None]:
    """Pooled and within-site correlations with the loss change, then with the token change."""
    found: list[float | None] = []
    for change in (ablation.loss_change(windows), ablation.token_change(windows)):
        found.append(spearman(torch.cat(list(values.values())), torch.cat([change[site] for site in values])))
        inside = [r for site, v in values.items() if (r := spearman(v, change[site])) is not None]
        found.append(sum(inside) / len(inside) if inside else None)
    return found


def _bounded(value: float | None, without: Sequence[float | None], shares: Sequence[float]) -> Correlation:
    known = [v for v in without if v is not None]
    if value is None or len(known) < max(2, len(without)):
        return Correlation(value)
    return Correlation(value, one_sample_interval(value, LeftOut(known, shares), (-1.0, 1.0)))


def skipping(found: Validation, why: Mapping[str, str]) -> Validation:
    """Add the metrics that could not be computed, each with the reason."""
    return replace(found, skipped=dict(why))
