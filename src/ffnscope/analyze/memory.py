"""What a calibration takes in memory and on disk, told before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ffnscope.analyze.levels import NOTHING, CoreRule, Extra, Params, level_statistics, takes_one_pass
from ffnscope.calibrate.collect import PassOptions, plan_steps
from ffnscope.calibrate.forward import experts_per_token
from ffnscope.calibrate.memory import pass_bytes, statistics_bytes
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.stream import find_stream
from ffnscope.registry import STATISTICS
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True)
class CalibrationBytes:
    """Bytes of a calibration.

    Attributes:
        memory: peak beyond bare forwards (and backwards) of the same batches.
        sums: share of ``memory`` that the sums take, those of two passes together.
        disk: size of the statistics in files.
    """

    memory: int
    sums: int
    disk: int

    @property
    def beside_batches(self) -> int:
        """Most that sums take beside the batches; while they are written to files, statistics are there twice."""
        return max(self.sums, 2 * self.disk)

    @property
    def told(self) -> str:
        """The three in words."""
        memory, sums, disk = (f"{size / 2**20:,.0f} MiB" for size in (self.memory, self.sums, self.disk))
        return f"calibration needs {memory} beside the model and its batches, {sums} of them for sums; {disk} on disk"


def calibration_bytes(
    model: nn.Module,
    windows: Windows,
    metrics: Params,
    *,
    sites: Sequence[FFNSite],
    rule: CoreRule,
    options: PassOptions,
    extra: Extra = NOTHING,
) -> CalibrationBytes:
    """Return what `calibrate_all` takes with the same arguments, and with the ``extra`` statistics.

    The model is not run, but on a few tokens where a metric also observes what is beside the FFNs.
    """
    names = [name for level in level_statistics(metrics, rule, extra) for name in level]
    core = rule.size(sites) + extra.pool
    taken = None if takes_one_pass(sites, metrics, options, extra) else core
    documents = extra.n_documents
    backward = [step.batch.input_ids.numel() for step in plan_steps(windows, names, options) if step.backward]
    given = max(backward, default=0), next(model.parameters()).dtype, taken
    beside = any(STATISTICS.get(name).beyond_ffns for name in names)
    more = statistics_bytes(find_stream(model, sites).observed, names) if beside else 0
    more += statistics_bytes(sites, names, 0, documents) - statistics_bytes(sites, names, 0)
    return CalibrationBytes(
        pass_bytes(sites, names, *given, experts_per_token=experts_per_token(model)) + more,
        statistics_bytes(sites, names, taken) + more,
        statistics_bytes(sites, names, core) + more,
    )
