"""One forward of a batch of windows, for calibration and evaluation alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows


def input_device(model: nn.Module) -> torch.device:
    """Device of the first parameter that is in memory."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def forward_logits(model: nn.Module, batch: Windows) -> Tensor:
    """Logits [b, T, vocab] of a batch, in the model's dtype and on its device.

    The attention mask is passed only when the batch holds padding.
    """
    device = input_device(model)
    mask = {} if bool(batch.valid.all()) else {"attention_mask": batch.valid.to(device, torch.int64)}
    return model(input_ids=batch.input_ids.to(device), use_cache=False, **mask).logits
