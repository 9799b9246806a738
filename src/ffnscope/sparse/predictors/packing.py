"""Whole numbers of a few bits, packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in [0, 2^bits), uint8 of any shape -> bytes [ceil(n bits / 8)] uint8, low bits first."""
    flat = codes.flatten()
    each = torch.stack([(flat >> bit) & 1 for bit in range(bits)], -1).flatten()
    each = torch.nn.functional.pad(each, (0, -len(each) % 8)).view(-1, 8)
    return (each << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first ``n`` codes that `pack` packed, [n] uint8."""
    each = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    codes = each.flatten()[: n * bits].view(n, bits)
    return (codes << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1).to(torch.uint8)
