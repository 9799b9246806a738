"""Perplexity: token-weighted over windows, with a standard error over windows and the protocol in the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ffnscope.calibrate.parallel import Ranks, shared
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.evaluate.forward import (
    batch_logits,
    check_finite,
    chunk_logits,
    evaluating,
    memory_errors,
    target_chunks,
)
from ffnscope.evaluate.streamed import shares_as_batches, streamed_text
from ffnscope.ffn.streamed import is_streamed
from ffnscope.types import EvalResult

MAX_MEAN_NLL = 700.0  # exp of more is not a float


def perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 1,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Perplexity of a causal LM on windows: exp(sum of token NLL / number of targets), whatever the batch size.

    Args:
        model: a `transformers` causal LM, on any device; left as it was.
        windows: the text; predicted are the tokens that ``windows.targets`` marks.
        batch_size: windows per forward pass.
        on_batch: called after each batch with (batches done, batches in all).

    Returns:
        The perplexity (unit "1") with its standard error over windows (None for one window).

    Raises:
        UsageError: no token is a target.
        NonFiniteError: a loss is NaN or infinite, or the perplexity is too large for a float.
        DeviceError: the accelerator is out of memory.
    """
    check_targets(windows)
    batches = list(windows.batches(batch_size))
    ranks = shared(model, serve_nll, batches, batch_size)
    parts = _all_nll(model, ranks, batches, batch_size, on_batch)
    return perplexity_result(torch.cat(parts), windows)


def serve_nll(model: nn.Module, ranks: Ranks, batches: Sequence[Windows], batch_size: int) -> None:
    """Take a share of the batches of a leading process."""
    _all_nll(model, ranks, batches, batch_size, None)


def _all_nll(
    model: nn.Module,
    ranks: Ranks,
    batches: Sequence[Windows],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """NLL sums of all batches, of which this process runs its share."""
    mine = list(enumerate(batches))[ranks.rank :: ranks.size]

    def run() -> dict[int, Tensor]:
        if is_streamed(model) and mine:
            return _streamed_nll(model, mine, batch_size, on_batch)
        found: dict[int, Tensor] = {}
        for i, batch in mine:
            found[i], _ = token_nll(model, batch, first=i * batch_size)
            if on_batch is not None:
                on_batch(min(i + ranks.size, len(batches)), len(batches))
        return found

    found = {i: nll for part in ranks.gathered(ranks.agreed(run)) for i, nll in part.items()}
    return [found[i] for i in range(len(batches))]


def _streamed_nll(
    model: nn.Module,
    numbered: Sequence[tuple[int, Windows]],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None,
) -> dict[int, Tensor]:
    """NLL sums of some batches by a model that runs block by block."""
    batches = [batch for _, batch in numbered]
    with memory_errors(batch_size, batches[0].length), streamed_text(model, batches) as text:
        sums = [found["nll"] for found in text.nll(shares_as_batches(on_batch, len(batches)))]
    for (i, batch), nll in zip(numbered, sums, strict=True):
        check_finite(nll, model, batch, i * batch_size)
    return {i: nll for (i, _), nll in zip(numbered, sums, strict=True)}


def token_nll(model: nn.Module, batch: Windows, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each window's targets, in nats.

    Args:
        model: a `transformers` causal LM; put in evaluation mode for the pass and back afterwards.
        batch: windows that fit in one forward pass.
        first: number of the batch's first window in the whole text, for error messages.

    Returns:
        Sum of the NLL per window, [b] fp64, and number of targets per window, [b] int64, both on the CPU.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        DeviceError: the accelerator is out of memory.
    """
    with evaluating(model), memory_errors(len(batch), batch.length):
        nll = nll_sums(batch_logits(model, batch), batch)
    check_finite(nll, model, batch, first)
    return nll, batch.targets.sum(1).cpu()


def nll_sums(logits: Tensor, batch: Windows) -> Tensor:
    """Sum of the NLL of each window's targets, [b] fp64 on the CPU, from logits [b, T, vocab]."""
    return token_losses(logits, batch).sum(1)


@torch.no_grad()
def token_losses(logits: Tensor, batch: Windows) -> Tensor:
    """NLL of every target, [b, T] fp64 on the CPU, 0 where there is no target, from logits [b, T, vocab]."""
    ids = batch.input_ids.cpu()
    nll = torch.zeros(ids.shape, dtype=torch.float64)
    for rows, columns in target_chunks(batch.targets, logits):
        log_p = chunk_logits(logits, rows, columns).log_softmax(-1)
        wanted = ids[rows, columns, None].to(log_p.device)
        nll[rows, columns] = -log_p.gather(-1, wanted)[:, 0].cpu().double()
    return nll


def perplexity_result(nll: Tensor, windows: Windows) -> EvalResult:
    """Perplexity from the NLL sums [n] of all windows; raises NonFiniteError where exp would overflow."""
    mean, stderr = window_ratio(nll, windows.targets.sum(1))
    if mean > MAX_MEAN_NLL:
        raise NonFiniteError(
            f"the mean NLL on {windows.source} is {mean:.4g} nats per token, so the perplexity exp({mean:.4g}) is too "
            "large for a float. The model is broken: remove less, or check the weights and the dtype."
        )
    value = math.exp(mean)
    error = None if stderr is None else value * stderr
    return EvalResult("perplexity", value, "1", error, windows.n_targets, windows.source, protocol(windows))


def window_ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Ratio sum(x) / sum(m) over windows, and its standard error by the delta method.

    Windows are the independent pieces: se = sqrt(n / (n - 1) * sum_i (x_i - r m_i)^2) / sum(m) over the n windows with
    m_i > 0; with equal m_i this is the standard error of the mean of the windows' means. None when n < 2.

    Args:
        sums: x [n], fp64.
        counts: m [n], number of targets.
    """
    m = counts.cpu().double()
    total = float(m.sum())
    value = float(sums.sum()) / total
    n = int((m > 0).sum())
    if n < 2:
        return value, None
    return value, math.sqrt(n / (n - 1) * float((sums - value * m).square().sum())) / total


def protocol(windows: Windows) -> str:
    """How the windows are evaluated, in one line."""
    padded = not bool(windows.valid.all())
    every = windows.valid.clone()
    every[:, 0] = False
    if padded:
        head = f"{len(windows)} windows of at most {windows.length} tokens, padding not counted"
    else:
        head = f"{len(windows)} non-overlapping windows x {windows.length} tokens"
    if torch.equal(windows.targets, every):
        predicted = "first token of each not predicted"
    else:
        predicted = f"{windows.n_targets} of {windows.n_tokens} tokens predicted"
    return f"{head}, {predicted}, token-weighted"


def check_targets(windows: Windows) -> None:
    """Raise UsageError when there is nothing to predict."""
    if windows.n_targets == 0:
        raise UsageError(
            f"{windows.source}: {len(windows)} window(s) with no token to predict; evaluation needs at least one "
            "window of two tokens with a target."
        )
