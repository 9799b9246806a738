"""Inputs of FFNs and gradients of the loss by their outputs, at the tokens of a few windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnscope.calibrate.observe import observe_batch
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.taps import SignalTap
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError
from ffnscope.ffn.frozen import frozen
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True, eq=False)
class OutputGradients:
    """Tokens of one FFN.

    Attributes:
        x: inputs [n, d_model], float32.
        dy: gradients of the summed token NLL (nats) by the output of the FFN at the same tokens [n, d_model], float32.
    """

    x: Tensor
    dy: Tensor


def output_gradients(
    model: nn.Module, sites: Sequence[FFNSite], windows: Windows, batch_size: int = 1
) -> Mapping[FFNSite, OutputGradients]:
    """One backward over some windows. All is held in memory: 8 bytes per token, FFN and input.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
        DeviceError: out of memory.
    """
    found: dict[tuple[FFNSite, str], list[Tensor]] = {}
    with frozen(model):
        for batch in windows.batches(batch_size):
            rows = TokenRows(batch.valid)

            def note(site: FFNSite, name: str, value: Tensor, rows: TokenRows = rows) -> None:
                found.setdefault((site, name), []).append(rows.take(site, value.detach()).float().cpu())

            tap = SignalTap(note, ("x", "dy"))
            observe_batch(model, sites, batch, None, lambda site, h, g: None, tap, rows.route)
    joined = {key: torch.cat(parts) for key, parts in found.items()}
    reached = [site for site in sites if (site, "dy") in joined]
    for site in reached:
        if not bool(joined[site, "dy"].isfinite().all()):
            raise NonFiniteError(f"a gradient by the output of {site.name} is NaN or infinite; use float32.")
    return {site: OutputGradients(joined[site, "x"], joined[site, "dy"]) for site in reached}


def fisher_damage(lost: Tensor, dy: Tensor) -> float:
    """Mean over tokens of sum_j dy_j^2 lost_j^2: diagonal Fisher information at what an output lacks, [n, d_model]."""
    return float((lost.double() * dy.double()).square().sum(-1).mean())
