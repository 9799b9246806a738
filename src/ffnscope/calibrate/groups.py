"""Groups of whole documents: the independent pieces of a text, of which intervals are made."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError

GROUPS = 8


def document_groups(windows: Windows, groups: int = GROUPS, seed: int = 0) -> list[Tensor]:
    """Split windows into at most ``groups`` groups of whole documents with about as many tokens each.

    Documents in random order, the longest first, each go to the group with the fewest tokens so far. A text of one
    document is one group.

    Args:
        windows: a calibration text.
        groups: number of groups; fewer when there are fewer documents.
        seed: of the random order.

    Returns:
        One mask [n] bool per group; every window is in exactly one.

    Raises:
        UsageError: fewer than 2 groups asked for.
    """
    if groups < 2:
        raise UsageError(f"groups must be at least 2, the parts of a text that are left out in turn; got {groups}.")
    documents, place = windows.document.unique(return_inverse=True)
    sizes = torch.zeros(len(documents), dtype=torch.int64).index_add_(0, place, windows.valid.sum(1))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    order = order[torch.sort(sizes[order], descending=True, stable=True).indices]
    filled = torch.zeros(min(groups, len(documents)), dtype=torch.int64)
    group_of = torch.empty_like(sizes)
    for document in order.tolist():
        lightest = int(filled.argmin())
        group_of[document] = lightest
        filled[lightest] += sizes[document]
    return [group_of[place] == g for g in range(len(filled))]
