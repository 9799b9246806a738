"""llmcompressor: oneshot with its modifiers for single weights, on gate, up and down of the FFNs. Not channel pruning.

Methods: wanda and sparsegpt at their defaults; sparsity is a fraction of every matrix, or N:M. The pipeline that the
package picks for them goes block by block over the pruned model. Its modifier for magnitude is for training only.
"""

from __future__ import annotations

import time

from job import arguments, batches, load_model, save
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch.utils.data import DataLoader

TARGETS = [r"re:.*mlp\.(gate|up|down)_proj$"]
MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
BATCH = 4


def main() -> None:
    args = arguments()
    model = load_model(args.checkpoint)
    loader = DataLoader(batches(args.windows, BATCH), batch_size=None)
    start = time.perf_counter()
    oneshot(model=model, dataset=loader, recipe=modifier(args.method, args.sparsity))
    save(model, args.out, "llmcompressor", start, save_options={"save_compressed": False})


def modifier(method: str, sparsity: str):
    if ":" not in sparsity:
        return MODIFIERS[method](targets=TARGETS, sparsity=float(sparsity))
    kept, group = map(int, sparsity.split(":"))
    return MODIFIERS[method](targets=TARGETS, sparsity=1 - kept / group, mask_structure=f"{group - kept}:{group}")


if __name__ == "__main__":
    main()
