"""One forward of a batch of windows, for calibration and evaluation alike."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import DeviceError, UsageError
from ffnscope.ffn.streamed import streaming_device


def input_device(model: nn.Module) -> torch.device:
    """Device that a streamed model computes on, of others that of the first parameter that is in memory."""
    first = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return streaming_device(model) or first


def forward_logits(model: nn.Module, batch: Windows) -> Tensor:
    """Logits [b, T, vocab] of a batch, in the model's dtype and on its device.

    The attention mask is passed only when the batch holds padding.

    Raises:
        UsageError: the windows are longer than the positions that the model was built for, or hold token ids that its
            embedding has no row for.
    """
    check_windows(model, batch)
    device = input_device(model)
    mask = {} if bool(batch.valid.all()) else {"attention_mask": batch.valid.to(device, torch.int64)}
    return model(input_ids=batch.input_ids.to(device), use_cache=False, **mask).logits


def check_windows(model: nn.Module, windows: Windows, *, key: str = "max_length") -> None:
    """Raise UsageError when windows are longer than the model's positions, or hold token ids that it has no row for.

    ``key`` names what chooses their length.
    """
    limit = max_positions(model)
    if limit is not None and limit < windows.length:
        raise UsageError(
            f"windows of {windows.length} tokens do not fit into {type(model).__name__}, which has {limit} positions. "
            f"Lower {key} to at most {limit}."
        )
    check_ids(model, windows)


def check_ids(model: nn.Module, windows: Windows) -> None:
    """Raise UsageError when the text holds token ids for which the embedding of the model has no row."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding) or not windows.input_ids.numel():
        return
    rows, highest = embedding.weight.shape[0], int(windows.input_ids.max())
    if highest >= rows:
        many = int((windows.input_ids >= rows).sum())
        raise UsageError(
            f"the text has token ids up to {highest} ({many:,} tokens), but the embedding of {type(model).__name__} "
            f"has {rows:,} rows, for ids 0 to {rows - 1}: the tokenizer is not that of the model. Give the model its "
            "own tokenizer, or add rows (model.resize_token_embeddings) and train them."
        )


def max_positions(model: nn.Module) -> int | None:
    """Tokens that a model was built for, or None when its config does not say."""
    return _of_config(model, "max_position_embeddings")


def experts_per_token(model: nn.Module, *, default: int = 1) -> int:
    """How many experts of a layer each token is routed to, or ``default`` when the model's config does not say."""
    return _of_config(model, "num_experts_per_tok") or default


def _of_config(model: nn.Module, name: str) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, name, None)
    return value if isinstance(value, int) and value > 0 else None


@contextlib.contextmanager
def memory_errors(message: str) -> Generator[None]:
    """Turn an out-of-memory error, of an accelerator or of the CPU, into a DeviceError with this message."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise DeviceError(message) from error
        raise
