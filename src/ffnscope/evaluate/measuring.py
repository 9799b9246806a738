"""What a comparison measures of each batch: batch by batch, block by block, or shared by several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ffnscope.apply.pruned import Pruned, as_pruned
from ffnscope.calibrate.parallel import Ranks, shared
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.evaluate.fidelity import fidelity
from ffnscope.evaluate.forward import batch_logits, check_finite, evaluating, memory_errors
from ffnscope.evaluate.perplexity import nll_sums
from ffnscope.evaluate.progress import DENSE, Progress
from ffnscope.evaluate.streamed import StreamedText, shares_as_batches, streamed_text
from ffnscope.ffn.streamed import is_streamed

Plans = Mapping[str, tuple[str, Pruned]]
"""Key of a row -> its label and plan."""
OnBatch = Callable[[int, int], None]
Found = dict[tuple[int, str], dict[str, Tensor]]
"""First window of a batch and key of a row -> sums per window."""


@dataclass(frozen=True, slots=True, eq=False)
class Missing:
    """A batch, the number of its first window in the text, and the rows that are not measured on it."""

    first: int
    batch: Windows
    keys: tuple[str, ...]


def measure(
    model: nn.Module,
    plans: Plans,
    windows: Windows,
    batch_size: int,
    progress: Progress,
    on_batch: OnBatch | None,
) -> None:
    """Fill what is missing in ``progress`` for the dense model and these plans; save it after each round."""
    todo: list[Missing] = []
    batches = list(windows.batches(batch_size))
    first = 0
    for batch in batches:
        part = slice(first, first + len(batch))
        keys = tuple(key for key in (DENSE, *plans) if not progress.has(key, part))
        todo += [Missing(first, batch, keys)] if keys else []
        first += len(batch)
    if not todo:
        return
    needed = {key: plans[key] for one in todo for key in one.keys if key != DENSE}
    ranks = shared(model, serve_rows, needed, todo)
    tell = None if on_batch is None else partial(_tell, on_batch, len(batches) - len(todo), len(batches))
    sizes = {one.first: len(one.batch) for one in todo}
    for found in _rounds(model, needed, todo, ranks, tell):
        for (start, key), sums in found.items():
            progress.put(key, slice(start, start + sizes[start]), sums)
        progress.save()


def serve_rows(model: nn.Module, ranks: Ranks, plans: Plans, todo: Sequence[Missing]) -> None:
    """Take a share of the batches of a leading process."""
    for _ in _rounds(model, plans, todo, ranks, None):
        pass


def _rounds(
    model: nn.Module, plans: Plans, todo: Sequence[Missing], ranks: Ranks, tell: OnBatch | None
) -> Iterator[Found]:
    """Yield what all processes have found, round by round."""
    if is_streamed(model):
        yield from _streamed_rounds(model, plans, todo, ranks, tell)
        return
    with evaluating(model):
        for start in range(0, len(todo), ranks.size):
            mine = todo[start + ranks.rank : start + ranks.rank + 1]
            yield _together(ranks, partial(_batches, model, plans, mine))
            if tell is not None:
                tell(min(start + ranks.size, len(todo)), len(todo))


def _together(ranks: Ranks, make: Callable[[], Found]) -> Found:
    return {key: sums for part in ranks.gathered(ranks.agreed(make)) for key, sums in part.items()}


def _batches(model: nn.Module, plans: Plans, mine: Sequence[Missing]) -> Found:
    """Measure whole batches, of which dense logits exist for one at a time."""
    found: Found = {}
    for one in mine:
        batch = one.batch
        with memory_errors(len(batch), batch.length):
            dense = batch_logits(model, batch)
            for key in one.keys:
                with naming(DENSE if key == DENSE else plans[key][0]):
                    sums = _dense_sums(dense, batch) if key == DENSE else _plan_sums(model, plans[key][1], batch, dense)
                    for value in sums.values():
                        check_finite(value, model, batch, one.first)
                found[one.first, key] = sums
    return found


def _streamed_rounds(
    model: nn.Module, plans: Plans, todo: Sequence[Missing], ranks: Ranks, tell: OnBatch | None
) -> Iterator[Found]:
    """One way of this process's batches through the blocks per row."""
    mine = todo[ranks.rank :: ranks.size]
    with contextlib.ExitStack() as stack:

        def begin() -> StreamedText | None:
            if not mine:
                return None
            with _memory_errors(mine):
                return stack.enter_context(streamed_text(model, [one.batch for one in mine]))

        text: StreamedText | None = ranks.agreed(begin)
        for key in (DENSE, *plans):
            shares = shares_as_batches(tell, len(mine))
            yield _together(ranks, partial(_row, model, plans, key, mine, text, shares))


def _row(
    model: nn.Module,
    plans: Plans,
    key: str,
    mine: Sequence[Missing],
    text: StreamedText | None,
    shares: OnBatch | None,
) -> Found:
    if text is None:
        return {}
    dense = key == DENSE
    with naming(DENSE if dense else plans[key][0]), _memory_errors(mine):
        with contextlib.nullcontext() if dense else as_pruned(model, plans[key][1]):
            sums = text.nll(shares) if dense else text.fidelity(shares)
        for one, found in zip(mine, sums, strict=True):
            for value in found.values():
                check_finite(value, model, one.batch, one.first)
    return {(one.first, key): found for one, found in zip(mine, sums, strict=True)}


def _memory_errors(mine: Sequence[Missing]) -> contextlib.AbstractContextManager[None]:
    """Within what processes agree on: an error that only one of them knows would leave the others waiting."""
    return memory_errors(len(mine[0].batch), mine[0].batch.length)


def _tell(on_batch: OnBatch, before: int, total: int, done: int, of: int) -> None:
    """Tell a share of what was missing as batches."""
    on_batch(before + (total - before) * done // of, total)


def _dense_sums(logits: Tensor, batch: Windows) -> dict[str, Tensor]:
    return {"nll": nll_sums(logits, batch)}


def _plan_sums(model: nn.Module, plan: Pruned, batch: Windows, dense: Tensor) -> dict[str, Tensor]:
    with as_pruned(model, plan):
        logits = batch_logits(model, batch)
    kl, agree = fidelity(dense, logits, batch.targets)
    return {"nll": nll_sums(logits, batch), "kl": kl, "agree": agree}


@contextlib.contextmanager
def naming(label: str) -> Generator[None]:
    """Say in an error which row it belongs to."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{label}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from error
