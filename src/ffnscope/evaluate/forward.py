"""One forward pass of an evaluation: logits of a batch of windows, and errors that say what went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn

from ffnscope.calibrate import forward
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError
from ffnscope.scoring import not_finite_weight

CHUNK_VALUES = 2**18  # logits that are held in fp32 at a time: 1 MiB a copy, which stays in a processor's cache
ON_ACCELERATOR = 32  # times as many, where a launch costs more than memory does


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put every module in evaluation mode; give each its own mode back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def memory_errors(n_windows: int, length: int) -> contextlib.AbstractContextManager[None]:
    """Turn an out-of-memory error into a DeviceError that names what to lower."""
    cure = "lower dataset.batch_size (batch_size)" if n_windows > 1 else "use shorter windows or a smaller dtype"
    return forward.memory_errors(
        f"out of memory while evaluating {n_windows} window(s) of {length} tokens at once; {cure}."
    )


def batch_logits(model: nn.Module, batch: Windows) -> Tensor:
    """Logits [b, T, vocab] of a batch without a graph. The model must be in evaluation mode."""
    with torch.inference_mode():
        return forward.forward_logits(model, batch)


def target_chunks(targets: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (window index, column index) of the targets [b, T], few enough for `CHUNK_VALUES` logits at a time."""
    values = CHUNK_VALUES * (1 if logits.device.type == "cpu" else ON_ACCELERATOR)
    windows, columns = targets.cpu().nonzero(as_tuple=True)
    size = max(1, values // logits.shape[-1])
    yield from zip(windows.split(size), columns.split(size), strict=True)


def chunk_logits(logits: Tensor, windows: Tensor, columns: Tensor) -> Tensor:
    """Logits [n, vocab] that predict the tokens at ``columns`` (one place to their left), in fp32, or fp64 if given."""
    rows = logits[windows.to(logits.device), columns.to(logits.device) - 1]
    return rows.to(torch.promote_types(logits.dtype, torch.float32))


def check_finite(sums: Tensor, model: nn.Module, batch: Windows, first: int) -> None:
    """Raise NonFiniteError unless every window's sum [b] is finite.

    Args:
        sums: one number per window of the batch.
        model: where to look for the cause.
        batch: the windows.
        first: number of the batch's first window in the whole text.
    """
    bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
    if bad:
        more = f" (and {len(bad) - 1} more of its batch)" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"window {first + bad[0]}{more} of {batch.source} has a loss that is NaN or infinite: {_cause(model)}"
        )


def _cause(model: nn.Module) -> str:
    name = not_finite_weight(model)
    if name is not None:
        return f"the weight {name} holds NaN or infinity. Load the model again from an intact checkpoint."
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return "the weights are finite, so a float16 activation probably overflowed. Load it in bfloat16 or float32."
    return "the weights are finite, so an activation overflowed. Evaluate in float32, and check what was changed last."
