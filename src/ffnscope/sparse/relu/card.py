"""The model card of a ReLU model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffnscope.apply.card import loading_code
from ffnscope.sparse.relu.thresholds import THRESHOLDS
from ffnscope.types import FFNSite


def relu_card(
    name: str, asked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], thresholds: Mapping[FFNSite, float]
) -> str:
    """Markdown text of the model card."""
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [relu, ffnscope]\n---\n"
    options, told = asked["options"], {row["stage"]: row for row in rows}
    lines = [
        front,
        f"# {name}\n",
        loading_code(name, remote=False),
        f"Made from {asked['model_id']}: the activation of its FFNs is {options['activation']}, and all weights were "
        f"**trained** for {options['steps']} steps with an L1 penalty on channel activations. Compare it with trained "
        "models only.\n",
        "| stage | perplexity | exact zeros |",
        "|---|---|---|",
    ]
    lines += [f"| {stage} | {row['perplexity']:.4g} | {row['sparsity']:.2%} |" for stage, row in told.items()]
    lines.append(f"\nPerplexity on {asked['held_out']['source']}; zeros are shares of the FFN channels per token.")
    if thresholds:
        lines.append(
            f"\nThe last row is with the thresholds of FATReLU in `{THRESHOLDS}`, which plain transformers does not "
            "read: what it loads has plain ReLUs. `set_thresholds_(model, read_thresholds(path))` of "
            "`ffnscope.sparse.relu` applies them."
        )
    return "\n".join(lines) + "\n"
