"""Seconds of prefill and decode of several models in turn, beside what the machine can do at the same time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.forward import input_device, max_positions
from ffnscope.calibrate.forward import memory_errors as explain_memory
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.evaluate.costs import Work, cached, last_logits
from ffnscope.evaluate.forward import evaluating

READ_BYTES = (2**26, 2**32)  # smallest and largest block of the bandwidth probe
MATRIX = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # side of the square product of the speed probe


@dataclass(frozen=True, slots=True)
class Spread:
    """Samples of one quantity, with median and quartiles."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.samples) < 2:
            raise UsageError(f"a spread needs at least 2 samples; got {len(self.samples)}. Measure more rounds.")

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile."""
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def per_second(self, count: int) -> Spread:
        """Rate of ``count`` things, where the samples are seconds."""
        return Spread(tuple(count / seconds for seconds in self.samples))

    def over(self, other: Spread) -> Spread:
        """Ratio sample by sample: both of a pair were taken in the same round."""
        return Spread(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and samples as plain values."""
        first, third = self.quartiles
        return {"median": self.median, "q1": first, "q3": third, "samples": list(self.samples)}


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """One generation.

    Attributes:
        tokens: [batch, new_tokens + 1] ids; the first comes from the prefill.
        prefill: seconds until the first token.
        decode: seconds of the ``new_tokens`` steps after it.
        cache_bytes: keys and values after the prompt, and at the end.
    """

    tokens: Tensor
    prefill: float
    decode: float
    cache_bytes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds per round: of each model's prefill and decode, and of the probes; bytes of KV cache per model."""

    prefill: dict[str, Spread]
    decode: dict[str, Spread]
    cache_bytes: dict[str, tuple[int, int]]
    bandwidth: Spread
    matmul: Spread


@torch.inference_mode()
def generate(model: Any, prompt: Tensor, new_tokens: int) -> Generated:
    """Greedy generation by the model's own forward with its default KV cache, timed; stops at no end-of-text token.

    `transformers`' ``generate`` is left out: its bookkeeping per step (stopping criteria, logits processors, masks)
    costs the same for any width and would hide a part of the difference between two models.

    Args:
        model: a `transformers` causal LM in evaluation mode.
        prompt: ids [batch, tokens] without padding, on the model's device.
        new_tokens: decode steps.

    Raises:
        NotAvailableError: the model keeps no KV cache.
        NonFiniteError: the last logits are NaN or infinite.
    """
    device, tokens = prompt.device, []
    _synchronize(device)
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, **last_logits(model))
    tokens.append(output.logits[:, -1:].argmax(-1))
    _synchronize(device)
    begun = time.perf_counter()
    cache = output.get("past_key_values")
    after_prompt = _cache_bytes(model, cache)
    resumed = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    _synchronize(device)
    end = time.perf_counter()
    if not bool(torch.isfinite(output.logits).all()):
        raise NonFiniteError(
            f"the logits of {type(model).__name__} are NaN or infinite after {new_tokens} new tokens. Check the "
            "weights, or use dtype bfloat16 or float32."
        )
    return Generated(
        torch.cat(tokens, 1).cpu(), begun - start, end - resumed, (after_prompt, _cache_bytes(model, cache))
    )


def take_turns(
    models: Mapping[str, nn.Module],
    work: Work,
    *,
    repeats: int,
    warmup: int,
    seed: int,
    on_round: Callable[[int, int], None] | None = None,
) -> Rounds:
    """Time the models one after the other in every round, in an order that turns, then probe the machine.

    Args:
        models: label -> model; all on one device, of one vocabulary and dtype.
        work: what each computes in a round, on the same random tokens.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        seed: of the random tokens.
        on_round: called after each round with (rounds done, rounds in all).

    Raises:
        UsageError: the tokens do not fit into the positions of a model.
        NotAvailableError, NonFiniteError: see `generate`.
        DeviceError: out of memory.
    """
    for model in models.values():
        check_positions(model, work)
    first = next(iter(models.values()))
    prompt = random_prompt(first, work, seed)
    probe = Probe(first)
    timed: dict[str, list[Generated]] = {label: [] for label in models}
    limits: list[tuple[float, float]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_errors(work))
        for model in models.values():
            stack.enter_context(evaluating(model))
        for number in range(warmup + repeats):
            for label in list(models)[:: 1 if number % 2 else -1]:
                timed[label].append(generate(models[label], prompt, work.new_tokens))
            limits.append((probe.bandwidth(), probe.matmul()))
            if on_round is not None:
                on_round(number + 1, warmup + repeats)
    kept = {label: found[warmup:] for label, found in timed.items()}
    return Rounds(
        {label: Spread(tuple(one.prefill for one in found)) for label, found in kept.items()},
        {label: Spread(tuple(one.decode for one in found)) for label, found in kept.items()},
        {label: found[-1].cache_bytes for label, found in kept.items()},
        Spread(tuple(speed for speed, _ in limits[warmup:])),
        Spread(tuple(speed for _, speed in limits[warmup:])),
    )


class Probe:
    """What the machine can do: bytes per second that it reads, and FLOP per second of a matrix product.

    The block that is read is as large as the model, so that caches help it no more than they help the model.
    """

    def __init__(self, model: nn.Module):
        weight = next(model.parameters())
        size = min(max(sum(p.nbytes for p in model.parameters()), READ_BYTES[0]), READ_BYTES[1])
        side = MATRIX[weight.device.type]
        self.block = torch.ones(size // 4, dtype=torch.float32, device=weight.device)
        self.matrix = torch.randn(side, side, device=weight.device).to(weight.dtype)

    def bandwidth(self) -> float:
        """Bytes per second of a sum over float32 numbers; the best of three."""
        return self.block.nbytes / min(_seconds(lambda: self.block.sum(), self.block.device) for _ in range(3))

    def matmul(self) -> float:
        """FLOP per second of a square product in the model's dtype; the best of three."""
        flops = 2 * self.matrix.shape[0] ** 3
        return flops / min(_seconds(lambda: self.matrix @ self.matrix, self.matrix.device) for _ in range(3))


def random_prompt(model: Any, work: Work, seed: int) -> Tensor:
    """Random token ids [batch_size, prompt_length] on the model's device."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (work.batch_size, work.prompt_length), generator=generator)
    return ids.to(input_device(model))


def check_positions(model: nn.Module, work: Work) -> None:
    """Raise UsageError when prompt and new tokens do not fit into the model's positions."""
    limit, wanted = max_positions(model), work.prompt_length + work.new_tokens
    if limit is not None and wanted > limit:
        raise UsageError(
            f"prompt_length {work.prompt_length} + new_tokens {work.new_tokens} = {wanted} tokens do not fit into "
            f"{type(model).__name__}, which has {limit} positions. Lower one of them."
        )


def memory_errors(work: Work) -> contextlib.AbstractContextManager[None]:
    """Turn an out-of-memory error into a DeviceError that names what to lower."""
    return explain_memory(
        f"out of memory while generating {work.new_tokens} tokens after {work.batch_size} prompt(s) of "
        f"{work.prompt_length}. Lower batch_size or prompt_length, or use a smaller dtype."
    )


@contextlib.contextmanager
def threads(count: int | None) -> Generator[None]:
    """Let torch use ``count`` CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise UsageError(f"threads must be at least 1; got {count}.")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cache_bytes(model: nn.Module, cache: Any) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in cached(model, cache))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
