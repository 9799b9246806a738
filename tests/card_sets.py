"""A tiny model with a text of its own and its traces, from which cards are fitted in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_options import CardOptions, CardTexts
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.tracing import trace
from tiny import tiny, tokens

RULE = SelectionRule("low_bit", "top_k", {"bits": 4, "group": 16})
N_DOCUMENTS = 60  # 36 to fit, 12 to calibrate, 12 to test


@torch.no_grad()
def written_by(model: Any, rows: int, length: int) -> Tensor:
    """Token ids [rows, length] drawn from a model."""
    ids, random = tokens(rows, 1), torch.Generator().manual_seed(0)
    while ids.shape[1] < length:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=random)], 1)
    return ids


class Set:
    """A tiny model, a text that it wrote itself, so that no change makes it better, and the traces of that."""

    def __init__(self, folder: Path, idle_layer: int | None = None):
        self.model = tiny("llama")
        with torch.no_grad():
            self.model.lm_head.weight.mul_(8)
            for layer, block in enumerate(self.model.model.layers):
                block.mlp.down_proj.weight.mul_(1e-3 if layer == idle_layer else 8)
        self.windows = contiguous_windows(written_by(self.model, N_DOCUMENTS, 16), "the model's own text")
        self.traces = trace(self.model, self.windows, folder / "traces")

    def fit(self, rule: SelectionRule = RULE, target: Any = None, **options: Any) -> SparsityCard:
        texts = CardTexts(self.windows)
        target = target or Target("density", 0.5)
        return fit_card(self.model, self.traces, rule, target, options=CardOptions(**options), texts=texts)[0]
