"""Calibration windows that judge a least squares which has not seen them: the same ones for both kinds of refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.calibrate.passes import OnBatch
from ffnscope.calibrate.windows import Windows
from ffnscope.types import ChannelStats, FFNSite

Statistics = Mapping[FFNSite, ChannelStats]
HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True, eq=False)
class FitStatistics:
    """What a one-shot reconstruction is fitted to.

    Attributes:
        whole: statistics of the whole text.
        held_out: ``h_outer`` of its held-out windows (see `collect_held_out`); None where there is none, or none is
            needed because the damping is given.
    """

    whole: Statistics
    held_out: Statistics | None = None


def is_held_out(windows: Windows) -> Tensor:
    """Mask [n] of every 8th window; of less than 8 windows there is none."""
    return torch.arange(len(windows)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def held_out_windows(windows: Windows) -> Windows:
    """Every 8th window of a calibration text, of which `reconstruct` takes the statistics as ``held_out``."""
    return windows[is_held_out(windows)]


def collect_held_out(
    model: nn.Module,
    windows: Windows,
    *,
    sites: Sequence[FFNSite] | None = None,
    options: PassOptions | None = None,
    on_batch: OnBatch | None = None,
) -> dict[FFNSite, ChannelStats] | None:
    """What `reconstruct` takes as ``held_out``: ``h_outer`` of every 8th window, by one more forward pass over these.

    Memory: as large as ``h_outer`` of the whole text, d_ff^2 numbers of 8 bytes per FFN.

    Args:
        model: a causal LM; left as it was.
        windows: the whole calibration text.
        sites: FFNs to observe; None finds all.
        options: sizes and checkpoint file of the pass; nothing runs backward.
        on_batch: called with (tokens done, tokens in all) after each batch.

    Returns:
        The statistics; None of less than 8 windows.

    Raises:
        NonFiniteError, DeviceError: see `collect`.
    """
    part = held_out_windows(windows)
    if not len(part):
        return None
    sizes = replace(options or PassOptions(), gradient_windows=None, gradient_length=None)
    return collect(model, part, ["h_outer"], sites=sites, options=sizes, on_batch=on_batch)
