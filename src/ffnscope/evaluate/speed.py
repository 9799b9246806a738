"""What a comparison of a dense and a pruned model found: measured and ideal ratios, shares of the limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ffnscope.errors import UsageError
from ffnscope.evaluate.costs import Costs, Work
from ffnscope.evaluate.pair import Removed
from ffnscope.evaluate.peak import PeakMemory
from ffnscope.evaluate.progress import DENSE
from ffnscope.evaluate.throughput import Spread

PRUNED = "pruned"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure.

    Attributes:
        work: prompts, their length, and new tokens.
        repeats: rounds that count; in each both models run once, in an order that turns.
        warmup: rounds before them that do not count.
        threads: CPU threads of torch; None = as they are set.
        seed: of the random prompt tokens.
        peak_memory: also load each model once more, in a process of its own, to measure its peak memory.
    """

    work: Work = field(default_factory=Work)
    repeats: int = 10
    warmup: int = 2
    threads: int | None = None
    seed: int = 0
    peak_memory: bool = True

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise UsageError(f"repeats must be at least 2, or there is no spread; got {self.repeats}.")
        if self.warmup < 0:
            raise UsageError(f"warmup must be at least 0 rounds; got {self.warmup}.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1; got {self.threads}.")


@dataclass(frozen=True, slots=True)
class Measured:
    """One model: its costs, and what was measured.

    Attributes:
        name: model id; "MODEL, sliced" for a model that a plan was applied to in memory.
        weights: hash of its weights.
        costs: parameters, bytes and FLOPs.
        file_bytes: bytes of its weight files, None for a model that was sliced in memory or is not on the disk.
        prefill: seconds of the prompts, per round.
        decode: seconds of all decode steps, per round.
        cache_bytes: keys and values after the prompt, and at the end.
        peak: peak memory, None when it was not measured.
    """

    name: str
    weights: str
    costs: Costs
    file_bytes: int | None
    prefill: Spread
    decode: Spread
    cache_bytes: tuple[int, int]
    peak: PeakMemory | None

    def step_bytes(self, *, cache: bool) -> float:
        """Bytes that one decode step must read: the weights, and with ``cache`` the mean of keys and values too."""
        return self.costs.read_bytes + (sum(self.cache_bytes) / 2 if cache else 0)


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """How many times faster the pruned model is: measured per round, and the ideal."""

    measured: Spread
    ideal: float

    @property
    def share(self) -> float:
        """Median speed-up as a fraction of the ideal one."""
        return self.measured.median / self.ideal


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A dense and a pruned model side by side.

    Attributes:
        dense: the dense model.
        pruned: the pruned model.
        removed: FFN parameters that are gone, checked against the plan.
        bandwidth: bytes per second that the machine read in the same rounds.
        matmul: FLOP per second of a square matrix product in the same rounds.
        options: how it was measured.
        setting: device, dtype, attention implementation and threads.
    """

    dense: Measured
    pruned: Measured
    removed: Removed
    bandwidth: Spread
    matmul: Spread
    options: BenchOptions
    setting: dict[str, Any]

    @property
    def prefill(self) -> SpeedUp:
        """Speed-up of the prompts; ideal = ratio of FLOPs."""
        ideal = self.dense.costs.prefill_flops / self.pruned.costs.prefill_flops
        return SpeedUp(self.dense.prefill.over(self.pruned.prefill), ideal)

    @property
    def decode(self) -> SpeedUp:
        """Speed-up of the decode steps; ideal = ratio of the parameter bytes that a step reads."""
        ideal = self.dense.step_bytes(cache=False) / self.pruned.step_bytes(cache=False)
        return SpeedUp(self.dense.decode.over(self.pruned.decode), ideal)

    @property
    def decode_with_cache(self) -> SpeedUp:
        """The same, with an ideal that counts the KV cache, which pruning of FFNs leaves as large as it was."""
        ideal = self.dense.step_bytes(cache=True) / self.pruned.step_bytes(cache=True)
        return SpeedUp(self.decode.measured, ideal)

    def flops_share(self, model: Measured) -> float:
        """Matrix FLOP per second of a model's prefill as a fraction of the machine's measured speed."""
        return model.costs.prefill_flops / model.prefill.median / self.matmul.median

    def bandwidth_share(self, model: Measured) -> float:
        """Bytes per second that a model's decode must read as a fraction of the measured bandwidth."""
        steps = self.options.work.new_tokens
        return model.step_bytes(cache=True) * steps / model.decode.median / self.bandwidth.median

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the samples of every round included."""
        ups = {"prefill": self.prefill, "decode": self.decode, "decode_with_cache": self.decode_with_cache}
        return {
            "setting": self.setting,
            "options": asdict(self.options),
            "models": {DENSE: self._model(self.dense), PRUNED: self._model(self.pruned)},
            "removed": {**asdict(self.removed), "share": self.removed.share},
            "speed_up": {k: {**v.measured.to_dict(), "ideal": v.ideal, "share": v.share} for k, v in ups.items()},
            "machine": {"read_bytes_per_s": self.bandwidth.to_dict(), "matmul_flop_per_s": self.matmul.to_dict()},
        }

    def tokens_per_second(self, model: Measured) -> tuple[Spread, Spread]:
        """Prompt tokens per second of prefill, and new tokens per second of decode, per round."""
        work = self.options.work
        return (
            model.prefill.per_second(work.batch_size * work.prompt_length),
            model.decode.per_second(work.batch_size * work.new_tokens),
        )

    def _model(self, model: Measured) -> dict[str, Any]:
        prefill, decode = self.tokens_per_second(model)
        return {
            "name": model.name,
            "weights": model.weights,
            **asdict(model.costs),
            "file_bytes": model.file_bytes,
            "cache_bytes": {"after_prompt": model.cache_bytes[0], "at_end": model.cache_bytes[1]},
            "prefill_seconds": model.prefill.to_dict(),
            "decode_seconds": model.decode.to_dict(),
            "prefill_tokens_per_s": prefill.to_dict(),
            "decode_tokens_per_s": decode.to_dict(),
            "share_of_matmul": self.flops_share(model),
            "share_of_bandwidth": self.bandwidth_share(model),
            "peak_bytes": None if model.peak is None else {**asdict(model.peak), "model": model.peak.model},
        }
