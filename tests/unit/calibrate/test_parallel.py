"""Several processes give the statistics, plans and perplexities of one, and only the first writes."""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.calibrate import parallel, passes
from ffnscope.calibrate.collect import PassOptions
from ffnscope.calibrate.parallel import ALONE, shared, shared_windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.evaluate import measuring
from ffnscope.evaluate import perplexity as perplexities
from ffnscope.evaluate.compare import EvalRow
from ffnscope.ffn.load import ModelSource
from ffnscope.io import read_plan, read_stats, write_json, write_plan, write_stats
from processes import started
from reference import padded
from streams import distance

METRICS = ["wanda", "scar_loss_proxy", "obs_loss"]
WINDOWS = padded([16, 9, 16, 12, 16, 5, 16])

SCRIPT = """
import sys
from pathlib import Path
import ffnscope
from test_parallel import work
with ffnscope.shared_windows() as leads:
    if leads:
        work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] or None)
"""


def noting(sizes: list[int]) -> None:
    """Note how many processes take part in each pass from now on."""

    def note(*arguments: Any) -> Any:
        ranks = shared(*arguments)
        sizes.append(ranks.size)
        return ranks

    for module in (passes, measuring, perplexities):
        module.shared = note  # type: ignore[attr-defined]


def work(checkpoint: Path, out: Path, stream: Any, batch_size: int = 2) -> None:
    """Calibrate, plan and evaluate, and write what is found."""
    sizes: list[int] = []
    noting(sizes)
    model = ffnscope.load_model(ModelSource(str(checkpoint), device="cpu", dtype="float64", stream=stream)).model
    options = PassOptions(batch_size=batch_size, checkpoint=out / "part.safetensors", checkpoint_every=2)
    stats = ffnscope.calibrate(model, WINDOWS, METRICS, options=options)
    plan = ffnscope.build_plan(ffnscope.score(model, stats, "scar_loss_proxy"), 0.5)
    rows = ffnscope.compare_plans(model, {"half": plan}, WINDOWS, batch_size=batch_size, state=out / "state.json")
    with ffnscope.masked(model, plan):  # the others do not know of it
        masked = ffnscope.perplexity(model, WINDOWS, batch_size=batch_size).value
    write_stats(out / "stats.safetensors", stats.values(), {})
    write_plan(out / "plan.json", plan)
    dense = ffnscope.perplexity(model, WINDOWS, batch_size=batch_size).value
    write_json(out / "values.json", {"dense": dense, "masked": masked, "rows": values(rows)})
    write_json(out / "sizes.json", {"sizes": sizes})


def values(rows: list[EvalRow]) -> list[float]:
    return [result.value for row in rows for result in row.results]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def single(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("single")
    before = [module.shared for module in (passes, measuring, perplexities)]
    work(checkpoint, out, None)
    for module, one in zip((passes, measuring, perplexities), before, strict=True):
        module.shared = one  # type: ignore[attr-defined]
    yield out


@pytest.mark.parametrize(("size", "stream"), [(2, ""), (3, ""), (2, "cpu")])
def test_several_processes_are_as_one(size: int, stream: str, checkpoint: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    ended = started(size, [str(script), str(checkpoint), str(out), stream], tmp_path)
    assert [status for status, _ in ended] == [0] * size, ended
    found, wanted = (read_stats(folder / "stats.safetensors")[0] for folder in (out, single))
    assert distance(found, wanted) <= 1e-9
    plans = [read_plan(folder / "plan.json") for folder in (out, single)]
    assert all(torch.equal(plans[0].kept[site], index) for site, index in plans[1].kept.items())
    one, other = (json.loads((folder / "values.json").read_text()) for folder in (out, single))
    for name, value in other.items():
        assert one[name] == pytest.approx(value, rel=1e-9)
    assert json.loads((out / "sizes.json").read_text())["sizes"] == [size, size, 1, size]
    assert {p.name for p in out.iterdir()} == {p.name for p in single.iterdir()}


KILLED = """
import os, signal
from ffnscope.calibrate.sweep_files import SweepFiles
real, cut = SweepFiles.end_stage, int(sys.argv[4])
def end_stage(self, done, *rest):
    real(self, done, *rest)
    print("stage", done, flush=True)
    if done == cut + int(os.environ["RANK"]):
        os.kill(os.getpid(), signal.SIGKILL)
SweepFiles.end_stage = end_stage
"""


def test_a_streamed_pass_of_two_processes_goes_on_where_each_was_killed(
    checkpoint: Path, single: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = tmp_path / "script.py"
    head, tail = SCRIPT.split("with ", 1)
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{head}{KILLED}with {tail}")
    given = [str(script), str(checkpoint), str(out), "disk"]
    cut = 2
    ended = started(2, [*given, str(cut)], tmp_path)
    assert [status for status, _ in ended] == [-signal.SIGKILL] * 2, ended
    ended = started(2, [*given, "-1"], tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    for rank, (_, told) in enumerate(ended):
        assert f"stage {cut + rank + 1}\n" in told
        assert f"stage {cut + rank}\n" not in told, "a finished stage was run again"
    found, wanted = (read_stats(folder / "stats.safetensors")[0] for folder in (out, single))
    assert distance(found, wanted) <= 1e-9
    assert {p.name for p in out.iterdir()} == {p.name for p in single.iterdir()}
    assert "the model of process 2 has other logits" in ended[0][1] or "another config" in ended[0][1]  # masked


def test_a_single_process_leads_and_shares_nothing(llama: Any) -> None:
    with shared_windows() as leads:
        assert leads
        assert shared(llama, print) is ALONE


def test_processes_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.n_processes_here() == 1
    monkeypatch.setattr(parallel, "n_processes", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert parallel.n_processes_here() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parallel.n_processes_here() == 4


def test_an_incomplete_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"RANK should hold a number.*torchrun"), shared_windows():
        pass


FAILING = """
import sys
from pathlib import Path
import ffnscope, torch
from ffnscope.errors import NonFiniteError
from test_parallel import WINDOWS
with ffnscope.shared_windows() as leads:
    if leads:
        model = ffnscope.load_model(ffnscope.ModelSource(sys.argv[1], device="cpu")).model
        try:
            ffnscope.perplexity(model, WINDOWS, batch_size=2)
        except NonFiniteError as error:
            print("told:", error)
"""


def test_an_error_in_one_process_ends_the_pass_in_all(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    token = int(WINDOWS.input_ids[2, 3])
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{FAILING}")
    ended = started(2, [str(script), str(folder)], tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "told: window" in ended[0][1]
    assert NonFiniteError.__name__ not in ended[1][1]


FULL = """
import os, sys, torch
import ffnscope
from ffnscope.errors import DeviceError
from ffnscope.evaluate.streamed import StreamedText
from test_parallel import WINDOWS
def nll(self, on_share=None):
    raise torch.OutOfMemoryError("CUDA out of memory.")
if os.environ["RANK"] == "1":
    StreamedText.nll = nll
with ffnscope.shared_windows() as leads:
    if leads:
        model = ffnscope.load_model(ffnscope.ModelSource(sys.argv[1], device="cpu", stream="cpu")).model
        try:
            ffnscope.compare_plans(model, {}, WINDOWS, batch_size=2)
        except DeviceError as error:
            print("told:", error)
"""


def test_a_process_without_memory_does_not_leave_the_others_waiting(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{FULL}")
    ended = started(2, [str(script), str(checkpoint)], tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "told: dense: out of memory while evaluating" in ended[0][1] or "told: out of memory" in ended[0][1]


def test_a_batch_is_sent_without_the_rest_of_the_text() -> None:
    batch = next(iter(padded([16] * 200).batches(2)))
    sent = pickle.dumps(batch)
    assert len(sent) < 4000
    assert pickle.loads(sent).hash == batch.hash
