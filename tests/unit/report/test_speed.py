"""The table of a bench made by hand."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ffnscope.evaluate.costs import Costs, Work
from ffnscope.evaluate.pair import Removed
from ffnscope.evaluate.peak import PeakMemory
from ffnscope.evaluate.speed import BenchOptions, BenchResult, Measured
from ffnscope.evaluate.throughput import Spread
from ffnscope.report.speed import print_speed, scaled, speed_markdown


def model(name: str, size: int, prefill: float, decode: float) -> Measured:
    costs = Costs(size, size - 400, 4 * size, 4 * size, 2000 * size, 80 * size)
    times = (Spread((prefill,) * 3), Spread((decode,) * 3))
    return Measured(name, "hash", costs, 4 * size + 100, *times, (100, 300), PeakMemory(9000 + 4 * size, 9000))


@pytest.fixture
def result() -> BenchResult:
    """Ideals of 1.25 in all; prefill reaches it, decode 1.1."""
    setting = {"device": "cpu", "device_name": "a CPU", "threads": 2, "dtype": "float32", "attention": "sdpa"}
    return BenchResult(
        model("d", 1000, 0.5, 1.1),
        model("p", 800, 0.4, 1.0),
        Removed(600, 200, 200),
        Spread((8000.0,) * 3),
        Spread((8e6,) * 3),
        BenchOptions(Work(1, 100, 10), repeats=3, warmup=1, seed=7),
        {**setting, "cache": "a cache"},
    )


def speed_line(phase: str, dense: str, pruned: str, ratio: str, share: str) -> str:
    cells = [f"{value} ({value} to {value})" for value in (dense, pruned, ratio)]
    return f"| {phase}, tokens/s | {' | '.join(cells)} | 1.250 | {share} |"


def test_markdown(result: BenchResult) -> None:
    text = speed_markdown(result)
    for line in (
        "### d against p",
        "| quantity | dense | pruned | ratio | ideal | of ideal |",
        "| parameters | 1,000 | 800 | 1.250 | – | – |",
        "| FFN parameters | 600 | 400 | 1.500 | – | – |",
        "| weight files | 4.1 kB | 3.3 kB | 1.242 | 1.250 | 99.4 % |",
        "| peak memory | 13 kB | 12.2 kB | 1.066 | – | – |",
        "| without libraries | 4 kB | 3.2 kB | 1.250 | 1.250 | 100 % |",
        "| compute of the prompt | 2 MFLOP | 1.6 MFLOP | 1.250 | – | – |",
        "| weights read per step | 4 kB | 3.2 kB | 1.250 | – | – |",
        speed_line("prefill", "200.0", "250.0", "1.250", "100 %"),
        speed_line("decode", "9.091", "10.00", "1.100", "88 %"),
    ):
        assert line in text.splitlines()
    for note in (
        "Removed 200 of 600 FFN parameters (33.333 %), exactly as planned.",
        "cpu: a CPU, 2 CPU threads, float32, attention sdpa, a cache.",
        "of 3 rounds after 1 of warm-up",
        "1 prompt of 100 random tokens (seed 7), then 10 greedy decode steps",
        "KV cache 100 B after the prompt, 300 B at the end, not pruned; with it the ideal of decode is 1.235 and the "
        "share 89 %.",
        "this machine read 8 kB/s and multiplied matrices at 8 MFLOP/s. Dense and pruned prefill reach 50 % and 50 % "
        "of that speed, decode 477 % and 425 % of that bandwidth",
        "Decode falls short of 0.9 of the ideal: on a line through both models, 60 ms of the pruned model's 100 ms do "
        "not depend on bytes of weights",
    ):
        assert note in text
    assert "Prefill falls short" not in text


def test_a_pruned_model_that_is_slower(result: BenchResult) -> None:
    text = speed_markdown(replace(result, pruned=model("p", 800, 0.6, 1.0)))
    assert "Prefill falls short of 0.9 of the ideal: the pruned model is not faster at all" in text


def test_what_was_not_measured_is_a_dash(result: BenchResult) -> None:
    sliced = replace(result.pruned, file_bytes=None, peak=None)
    text = speed_markdown(replace(result, pruned=sliced, removed=Removed(600, 200, None)))
    assert "| weight files | 4.1 kB | – | – | – | – |" in text
    assert "| peak memory | 13 kB | – | – | – | – |" in text
    assert "there is no plan to compare with." in text
    text = speed_markdown(replace(result, removed=Removed(600, 200, 300, padded=True)))
    assert "the plan removes 300; the rest is still in the model, as zeros." in text


@pytest.mark.parametrize("width", [80, 160])
def test_terminal(result: BenchResult, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_speed(result, console)
    text = console.file.getvalue()
    for words in ("weights read per step", "9.091", "(9.091 to", "exactly as planned."):
        assert words in text
    assert max(map(len, text.splitlines())) <= width


def test_scaled() -> None:
    assert [scaled(v, "B") for v in (999, 1000, 538_090_408, 2e18)] == ["999 B", "1 kB", "538.1 MB", "2000 PB"]
