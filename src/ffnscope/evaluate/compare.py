"""Compare plans: perplexity, KL to the dense model and top-1 agreement of each, all on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ffnscope.apply.pruned import Pruned, plan_of, row_name
from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.measuring import measure, naming
from ffnscope.evaluate.perplexity import check_targets, perplexity_result, protocol, window_ratio
from ffnscope.evaluate.progress import DENSE, Progress, check_labels, open_progress, plan_key
from ffnscope.types import EvalResult


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One line of a comparison.

    Attributes:
        label: name of the plan, or "dense".
        metric: metric that ranked the channels, with the name of a reconstruction where there is one ("obs_loss +
            sequential refit"); None for the dense model.
        sparsity_asked: fraction of channels that the budget asked to remove.
        sparsity: fraction that the plan removes.
        dataset: text that it was measured on.
        results: "perplexity"; for a plan also "kl_to_dense" (nats/token) and "top1_agreement" (fraction).
    """

    label: str
    metric: str | None
    sparsity_asked: float
    sparsity: float
    dataset: str
    results: tuple[EvalResult, ...]


def compare_plans(
    model: nn.Module,
    plans: Mapping[str, Pruned],
    windows: Windows,
    *,
    batch_size: int = 1,
    state: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[EvalRow]:
    """Evaluate the dense model and every plan (by masking) or reconstruction on the same windows.

    Windows are the outer loop, so dense logits exist for one batch at a time. The numbers are sums per window: they do
    not depend on the batch size, nor on where a comparison was cut off and continued. Of a streamed model, whose blocks
    are read once per row, rows are the outer loop, and ``state`` is written after each row.

    Args:
        model: the dense model; bit-identical afterwards.
        plans: label -> plan or reconstruction. "dense" is taken.
        windows: the text.
        batch_size: windows per forward pass.
        state: file with what was measured; written after each batch, continued from if it belongs to the same text and
            model. A new plan computes only its own windows.
        on_batch: called after each batch that was computed with (batches done, batches in all).

    Returns:
        The dense row, then one row per plan in the order given.

    Raises:
        UsageError: no target, a plan called "dense", or a plan of another model.
        NonFiniteError: a loss is NaN or infinite.
        DeviceError: the accelerator is out of memory.
        ArtifactError: ``state`` is damaged or of another kind.
    """
    check_targets(windows)
    check_labels(plans)
    keys = {label: plan_key(plan) for label, plan in plans.items()}
    distinct = {keys[label]: (label, plan) for label, plan in plans.items()}
    progress = open_progress(state, model, windows)
    measure(model, distinct, windows, batch_size, progress, on_batch)
    rows = [EvalRow(DENSE, None, 0.0, 0.0, windows.source, (perplexity_result(progress.total(DENSE, "nll"), windows),))]
    return rows + [_row(label, plan, keys[label], progress, windows) for label, plan in plans.items()]


def _row(label: str, plan: Pruned, key: str, progress: Progress, windows: Windows) -> EvalRow:
    counts = windows.targets.sum(1)
    how = protocol(windows)
    with naming(label):
        results = [perplexity_result(progress.total(key, "nll"), windows)]
    for name, quantity, unit in (("kl_to_dense", "kl", "nats/token"), ("top1_agreement", "agree", "fraction")):
        value, stderr = window_ratio(progress.total(key, quantity), counts)
        results.append(EvalResult(name, value, unit, stderr, windows.n_targets, windows.source, how))
    found = plan_of(plan)
    return EvalRow(label, row_name(plan), found.budget.sparsity, found.sparsity, windows.source, tuple(results))
