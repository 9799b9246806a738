"""The table of `ffnscope.bench`: dense and pruned side by side, ratios beside their ideals, and why they fall short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffnscope.report.tables import BLANK, Cell, Grid, grid_markdown, number, percent, print_grid

if TYPE_CHECKING:
    from rich.console import Console

    from ffnscope.evaluate.speed import BenchResult
    from ffnscope.evaluate.throughput import Spread

EXPECTED_SHARE = 0.9  # of the ideal speed-up; below it the notes look for the reason
_AROUND_FLOPS = (
    "FLOPs",
    "norms, activation functions, launching of operations, and in a short prompt reading the weights",
)
_AROUND_BYTES = ("bytes of weights", "attention, copying of the KV cache, norms, launching of operations")
_COLUMNS = ["quantity", "dense", "pruned", "ratio", "ideal", "of ideal"]
_PREFIXES = ("", "k", "M", "G", "T", "P")


def print_speed(result: BenchResult, console: Console) -> None:
    """Print the comparison in the terminal."""
    print_grid(_grid(result), console)


def speed_markdown(result: BenchResult) -> str:
    """Return the comparison as a Markdown table with notes."""
    return grid_markdown(_grid(result))


def _grid(result: BenchResult) -> Grid:
    lines = [[Cell(text) for text in line] for line in (*_size_lines(result), *_speed_lines(result))]
    notes = [_removed(result), *_setting(result), *_limits(result), *_reasons(result)]
    return Grid(f"{result.dense.name} against {result.pruned.name}", _COLUMNS, lines, notes)


def _size_lines(result: BenchResult) -> list[list[str]]:
    one, other = result.dense, result.pruned
    ideal = one.costs.parameter_bytes / other.costs.parameter_bytes
    peak, pruned_peak = one.peak, other.peak
    return [
        _sizes("parameters", one.costs.parameters, other.costs.parameters, ""),
        _sizes("FFN parameters", one.costs.ffn_parameters, other.costs.ffn_parameters, ""),
        _sizes("weight files", one.file_bytes, other.file_bytes, "B", ideal),
        _sizes("peak memory", peak and peak.total, pruned_peak and pruned_peak.total, "B"),
        _sizes("without libraries", peak and peak.model, pruned_peak and pruned_peak.model, "B", ideal),
        _sizes("compute of the prompt", one.costs.prefill_flops, other.costs.prefill_flops, "FLOP"),
        _sizes("weights read per step", one.costs.read_bytes, other.costs.read_bytes, "B"),
    ]


def _sizes(name: str, one: int | None, other: int | None, unit: str, ideal: float | None = None) -> list[str]:
    sizes = [BLANK if size is None else scaled(size, unit) if unit else f"{size:,}" for size in (one, other)]
    if one is None or other is None:
        return [name, *sizes, BLANK, BLANK, BLANK]
    found = one / other
    judged = [BLANK, BLANK] if ideal is None else [f"{ideal:.3f}", percent(round(found / ideal, 3))]
    return [name, *sizes, f"{found:.3f}", *judged]


def _speed_lines(result: BenchResult) -> list[list[str]]:
    one, other = (result.tokens_per_second(m) for m in (result.dense, result.pruned))
    phases = (("prefill, tokens/s", result.prefill), ("decode, tokens/s", result.decode))
    return [
        [name, _rate(one[i]), _rate(other[i]), _times(up.measured), f"{up.ideal:.3f}", percent(round(up.share, 3))]
        for i, (name, up) in enumerate(phases)
    ]


def _rate(spread: Spread) -> str:
    first, third = spread.quartiles
    return f"{number(spread.median)} ({number(first)} to {number(third)})"


def _times(spread: Spread) -> str:
    first, third = spread.quartiles
    return f"{spread.median:.3f} ({first:.3f} to {third:.3f})"


def _removed(result: BenchResult) -> str:
    removed = result.removed
    head = f"Removed {removed.found:,} of {removed.dense:,} FFN parameters ({100 * removed.share:.3f} %)"
    if removed.planned is None:
        return f"{head}; there is no plan to compare with."
    if removed.padded:
        return f"{head}; the plan removes {removed.planned:,}; the rest is still in the model, as zeros."
    return f"{head}, exactly as planned."


def _setting(result: BenchResult) -> list[str]:
    options, setting, work = result.options, result.setting, result.options.work
    prompts = "prompt" if work.batch_size == 1 else "prompts"
    return [
        f"{setting['device']}: {setting['device_name']}, {setting['threads']} CPU threads, {setting['dtype']}, "
        f"attention {setting['attention']}, {setting['cache']}.",
        f"Speeds: median (first to third quartile) of {options.repeats} rounds after {options.warmup} of warm-up, the "
        f"two models in turn; {work.batch_size} {prompts} of {work.prompt_length} random tokens (seed {options.seed}), "
        f"then {work.new_tokens} greedy decode steps of the model's own forward. Their ratios are pruned over dense, "
        "taken within a round; all others are dense over pruned.",
        "Ideal: ratio of FLOPs for prefill, of the bytes of weights that a step reads for decode, of all for files and "
        "memory.",
        *_experts(result),
    ]


def _experts(result: BenchResult) -> list[str]:
    """What FLOPs and bytes of a mixture of experts assume."""
    used, batch = result.dense.costs.experts, result.options.work.batch_size
    if used is None:
        return []
    how = "its own" if batch == 1 else f"those of {batch} tokens that choose independently, every expert as likely"
    return [
        f"Mixture of experts (means over layers): a token is counted with {used.per_token:.4g} of {used.total:.4g} "
        f"experts, as a few tokens of this model were routed; a decode step is taken to read {used.per_step:.4g} "
        f"({how}). Which experts the timed tokens chose is not in these numbers."
    ]


def _limits(result: BenchResult) -> list[str]:
    one, other = result.dense, result.pruned
    cache = result.decode_with_cache
    start, end = (scaled(size, "B") for size in one.cache_bytes)
    flops, bandwidth = (
        " and ".join(f"{100 * share(model):.0f} %" for model in (one, other))
        for share in (result.flops_share, result.bandwidth_share)
    )
    return [
        f"KV cache {start} after the prompt, {end} at the end, not pruned; with it the ideal of decode is "
        f"{cache.ideal:.3f} and the share {percent(round(cache.share, 3))}.",
        f"In the same rounds this machine read {scaled(result.bandwidth.median, 'B/s')} and multiplied matrices at "
        f"{scaled(result.matmul.median, 'FLOP/s')}. Dense and pruned prefill reach {flops} of that speed, decode "
        f"{bandwidth} of that bandwidth (weights and KV cache).",
    ]


def _reasons(result: BenchResult) -> list[str]:
    """For a speed-up below what is expected: how much of the time does not shrink with the weights."""
    one, other, steps = result.dense, result.pruned, result.options.work.new_tokens
    flops = (one.costs.prefill_flops, other.costs.prefill_flops)
    read = (one.costs.read_bytes, other.costs.read_bytes)
    times = (
        ("Prefill", result.prefill, one.prefill.median, other.prefill.median, flops, _AROUND_FLOPS),
        ("Decode", result.decode, one.decode.median / steps, other.decode.median / steps, read, _AROUND_BYTES),
    )
    found: list[str] = []
    for name, up, dense, pruned, cost, around in times:
        if up.share < EXPECTED_SHARE and cost[0] > cost[1]:
            found.append(
                f"{name} falls short of {EXPECTED_SHARE:g} of the ideal: {_fixed(dense, pruned, cost, around)}"
            )
    return found


def _fixed(dense: float, pruned: float, cost: tuple[int, int], around: tuple[str, str]) -> str:
    """Where the line through both times meets zero cost; ``around``: the cost's name, and what else takes time."""
    what, else_ = around
    if pruned >= dense:
        return f"the pruned model is not faster at all, so its time does not come from {what}, or the machine was busy."
    fixed = pruned - cost[1] * (dense - pruned) / (cost[0] - cost[1])
    return (
        f"on a line through both models, {1e3 * fixed:.3g} ms of the pruned model's {1e3 * pruned:.3g} ms do not "
        f"depend on {what} ({else_})."
    )


def scaled(value: float, unit: str) -> str:
    """Write a number to four digits with a decimal prefix: 538_090_408, "B" -> "538.1 MB"."""
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {_PREFIXES[power]}{unit}".strip()
