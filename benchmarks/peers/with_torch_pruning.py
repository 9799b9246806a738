"""torch-pruning: its dependency graph, pruner and importance on the FFN channels of a LLaMA-like model.

Methods: magnitude (GroupMagnitudeImportance, p=2) and taylor (GroupTaylorImportance, gradients of the mean loss of
every fourth window), both as the package has them by default: mean over gate, up and down. Every layer loses the same
share. The gradients are kept beside the windows for other sparsities, whose time then does not count them again.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch_pruning
from job import arguments, batches, load_model, save
from safetensors.torch import load_file, save_file

TAYLOR = "taylor, 32 windows"
IMPORTANCE = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    TAYLOR: torch_pruning.importance.GroupTaylorImportance,
}
BATCH = 4


def main() -> None:
    args = arguments()
    model = load_model(args.checkpoint)
    model.config.use_cache = False
    start = time.perf_counter()
    if args.method == TAYLOR:
        gradients(model, args.windows)
    prune(model, IMPORTANCE[args.method](), float(args.sparsity))
    model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    model.config.use_cache = True
    save(model, args.out, "torch-pruning", start)


def gradients(model, windows: Path) -> None:
    """Gradients of the mean loss; kept beside the windows, as other sparsities need the same ones."""
    kept = windows.with_name(f"{windows.stem}-gradients.safetensors")
    if not kept.exists():
        parts = batches(windows, BATCH, every=4)
        for batch in parts:
            (model(**batch, labels=batch["input_ids"]).loss / len(parts)).backward()
        unfinished = kept.with_suffix(".part")
        save_file({name: p.grad for name, p in model.named_parameters()}, unfinished)
        unfinished.rename(kept)
    found = load_file(kept)
    for name, parameter in model.named_parameters():
        parameter.grad = found[name]


def prune(model, importance, sparsity: float) -> None:
    """Only gate, up and down may change; the pruner is told to ignore every other linear layer."""
    ffn = {linear for layer in model.model.layers for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)}
    others = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) and m not in ffn]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        importance=importance,
        pruning_ratio=sparsity,
        ignored_layers=others,
        output_transform=lambda out: out.logits,
        root_module_types=[torch.nn.Linear],
    )
    pruner.step()


if __name__ == "__main__":
    main()
