"""OptiPFair: prune_model(pruning_type="MLP_GLU") with its selection methods.

Methods: MAW (its peak-to-peak magnitude), VOW, PON, L2, and hybrid: MAW with a data loader of calibration windows. The
package adds the norms of batches, not their squares, so the batch size is part of its result: 4 windows here.
"""

from __future__ import annotations

import time

import optipfair
from job import arguments, batches, load_model, save

BATCH = 4


def main() -> None:
    args = arguments()
    model = load_model(args.checkpoint)
    hybrid = args.method == "hybrid"
    start = time.perf_counter()
    pruned = optipfair.prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW" if hybrid else args.method,
        pruning_percentage=100 * float(args.sparsity),
        dataloader=batches(args.windows, BATCH) if hybrid else None,
        show_progress=False,
    )
    save(pruned, args.out, "optipfair", start)


if __name__ == "__main__":
    main()
