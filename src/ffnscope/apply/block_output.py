"""How the output of an FFN enters the output of its block, measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ffnscope.apply.columns import columns_replaced
from ffnscope.calibrate.blocks import open_blocks
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.taps import channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.types import FFNSite

_PIECE = (1, 32)  # windows and tokens that it is measured on
_LEFT = 0.02  # share of the change of a block's output that may be left unexplained, beside rounding
_ONE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 1e-2


def output_gains(model: nn.Module, sites: Sequence[FFNSite], windows: Windows) -> dict[FFNSite, float]:
    """Number by which each dense FFN's output is multiplied where its block adds it to what it puts out.

    It is 1 in most models. An FFN that is absent enters in another way, as through a norm behind it, or is an expert. A
    single block is run on a short piece of text as it is and with zeros for the FFN's down columns; the difference
    must be the same multiple of what these columns put out, for every token and every output.

    The model must be `frozen`; it is bit-identical afterwards.
    """
    found: dict[FFNSite, float] = {}
    piece = windows[: _PIECE[0]].cut(_PIECE[1])
    blocks, (hidden,) = open_blocks(model, sites, [piece])
    rows = TokenRows(piece.valid)
    with torch.no_grad():
        for block, here in enumerate(blocks.sites_of(sites)):
            dense = [site for site in here if site.expert is None]
            channels: dict[FFNSite, Tensor] = {}
            taps = channel_taps(model, dense, lambda site, h, to=channels: to.update({site: h}))
            with taps, blocks.held(block):
                output = blocks.run(block, 0, hidden)
            for site in dense:
                with materialised(model, site):
                    down = weights_of(model, site).down.double()
                with columns_replaced(model, {site: torch.zeros_like(down)}), blocks.held(block):
                    without = blocks.run(block, 0, hidden)
                written = rows.take(site, channels[site]).to(down) @ down.T
                gain = _gain(rows.take(site, output), rows.take(site, without), written)
                if gain is not None:
                    found[site] = gain
            hidden = output
    return found


def _gain(output: Tensor, without: Tensor, written: Tensor) -> float | None:
    """The number g with output - without = g * written, or None."""
    change = (output.double() - without.double()).flatten()
    written = written.to(change.device).flatten()
    power = float(written @ written)
    if written.shape != change.shape or not power:
        return None
    gain = float(change @ written) / power
    rounding = 4 * torch.finfo(output.dtype).eps * output.double().abs().flatten()
    left = ((change - gain * written).abs() - rounding).clamp_min(0)
    if not gain or float(left.norm()) > _LEFT * float(change.norm()):
        return None
    return 1.0 if abs(gain - 1) < _ONE.get(output.dtype, _COARSE) else gain
