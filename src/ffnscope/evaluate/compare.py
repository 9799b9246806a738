"""Compare plans: perplexity, KL to the dense model and top-1 agreement of each, all on the same windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import Tensor, nn

from ffnscope.apply.pruned import Pruned, as_pruned, plan_of, row_name
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.evaluate.fidelity import fidelity
from ffnscope.evaluate.forward import batch_logits, check_finite, evaluating, memory_errors
from ffnscope.evaluate.perplexity import check_targets, nll_sums, perplexity_result, protocol, window_ratio
from ffnscope.evaluate.progress import DENSE, Progress, check_labels, open_progress, plan_key
from ffnscope.evaluate.streamed import shares_as_batches, streamed_text
from ffnscope.ffn.streamed import is_streamed
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
    total = math.ceil(len(windows) / batch_size) if batch_size > 0 else 0
    if is_streamed(model):
        _measure_streamed(model, distinct, list(windows.batches(batch_size)), progress, on_batch)
    with evaluating(model):
        for index, batch in enumerate(windows.batches(batch_size)):
            if _measure(model, distinct, batch, index * batch_size, progress):
                progress.save()
                if on_batch is not None:
                    on_batch(index + 1, total)
    rows = [EvalRow(DENSE, None, 0.0, 0.0, windows.source, (perplexity_result(progress.total(DENSE, "nll"), windows),))]
    return rows + [_row(label, plan, keys[label], progress, windows) for label, plan in plans.items()]


def _measure(
    model: nn.Module, plans: Mapping[str, tuple[str, Pruned]], batch: Windows, first: int, progress: Progress
) -> bool:
    """Fill what is missing of one batch; False when nothing was."""
    part = slice(first, first + len(batch))
    missing = [key for key in (DENSE, *plans) if not progress.has(key, part)]
    if not missing:
        return False
    with memory_errors(len(batch), batch.length):
        dense = batch_logits(model, batch)
        for key in missing:
            with _naming(DENSE if key == DENSE else plans[key][0]):
                sums = _dense_sums(dense, batch) if key == DENSE else _plan_sums(model, plans[key][1], batch, dense)
                for value in sums.values():
                    check_finite(value, model, batch, first)
            progress.put(key, part, sums)
    return True


def _measure_streamed(
    model: nn.Module,
    plans: Mapping[str, tuple[str, Pruned]],
    batches: Sequence[Windows],
    progress: Progress,
    on_batch: Callable[[int, int], None] | None,
) -> None:
    """Fill what is missing with one way of all windows through the blocks per row."""
    starts = list(accumulate((len(batch) for batch in batches), initial=0))
    whole = slice(0, starts[-1])
    missing = [key for key in plans if not progress.has(key, whole)]
    if not missing and progress.has(DENSE, whole):
        return
    with memory_errors(len(batches[0]), batches[0].length), streamed_text(model, batches) as text:
        for key in (DENSE, *missing):
            label = DENSE if key == DENSE else plans[key][0]
            tell = shares_as_batches(on_batch, len(batches))
            pruned = contextlib.nullcontext() if key == DENSE else as_pruned(model, plans[key][1])
            with _naming(label):
                with pruned:
                    sums = text.nll(tell) if key == DENSE else text.fidelity(tell)
                for start, batch, found in zip(starts, batches, sums, strict=False):
                    for value in found.values():
                        check_finite(value, model, batch, start)
                    progress.put(key, slice(start, start + len(batch)), found)
            progress.save()


def _dense_sums(logits: Tensor, batch: Windows) -> dict[str, Tensor]:
    return {"nll": nll_sums(logits, batch)}


def _plan_sums(model: nn.Module, plan: Pruned, batch: Windows, dense: Tensor) -> dict[str, Tensor]:
    with as_pruned(model, plan):
        logits = batch_logits(model, batch)
    kl, agree = fidelity(dense, logits, batch.targets)
    return {"nll": nll_sums(logits, batch), "kl": kl, "agree": agree}


def _row(label: str, plan: Pruned, key: str, progress: Progress, windows: Windows) -> EvalRow:
    counts = windows.targets.sum(1)
    how = protocol(windows)
    with _naming(label):
        results = [perplexity_result(progress.total(key, "nll"), windows)]
    for name, quantity, unit in (("kl_to_dense", "kl", "nats/token"), ("top1_agreement", "agree", "fraction")):
        value, stderr = window_ratio(progress.total(key, quantity), counts)
        results.append(EvalResult(name, value, unit, stderr, windows.n_targets, windows.source, how))
    found = plan_of(plan)
    return EvalRow(label, row_name(plan), found.budget.sparsity, found.sparsity, windows.source, tuple(results))


@contextlib.contextmanager
def _naming(label: str) -> Generator[None]:
    """Say in an error which row it belongs to."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{label}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from error
