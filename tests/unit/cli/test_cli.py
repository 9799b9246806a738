"""The commands run, inspect, metrics, score, plan and eval; errors and exit codes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

import ffnscope
from checkpoints import make_checkpoint, small_tokenizer
from ffnscope.calibrate import passes as calibrating
from ffnscope.cli.files import read_plans
from ffnscope.io import read_plan, read_scores, read_stats, write_plan, write_stats
from ffnscope.plan.build import build_plan
from ffnscope.registry import METRICS
from runs import small_run, strict_json
from tiny import D_FF, HIDDEN, LAYERS
from tiny_all import tiny_causal_lm

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def plans(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the plans a.json (25 %) and b.json (50 %) of the checkpoint."""
    folder = tmp_path_factory.mktemp("plans")
    loaded = ffnscope.load_model(str(checkpoint))
    scores = ffnscope.score(loaded.model, ffnscope.find_sites(loaded.model), "weight_magnitude")
    for name, sparsity in (("a", 0.25), ("b", 0.5)):
        write_plan(folder / f"{name}.json", build_plan(scores, sparsity, protected=ffnscope.top_core(scores, count=2)))
    return folder


@pytest.fixture
def config_file(checkpoint: Path, texts: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_run(checkpoint, texts, tmp_path / "out")))
    return path


# --- the program ---


def test_version(ok: Ok) -> None:
    assert ok("--version").stdout == f"{ffnscope.__version__}\n"


def test_help_names_every_command(ok: Ok) -> None:
    text = ok("--help").stdout
    for name in ("run", "score", "plan", "prune", "eval", "bench", "inspect", "metrics"):
        assert f" {name} " in text


@pytest.mark.parametrize(
    "command", [["run"], ["score"], ["plan", "show"], ["plan", "diff"], ["prune"], ["eval"], ["bench"]]
)
def test_help_of_every_command(ok: Ok, command: list[str]) -> None:
    assert "Usage:" in ok(*command, "--help").stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "x.yaml", "--nonsense"], ["plan", "nonsense"]])
def test_wrong_use_ends_with_2(fails: Fails, arguments: list[str]) -> None:
    assert "Usage:" in fails(2, *arguments)


def python_m(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ffnscope", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_python_m_runs_and_prints_results(config_file: Path, tmp_path: Path) -> None:
    done = python_m("run", config_file, "--set", "pruning.ratios=[0.5]")
    assert done.returncode == 0, done.stderr
    assert "Perplexity on" in done.stdout
    assert f"results in {tmp_path / 'out'}" in done.stderr
    assert (tmp_path / "out" / "plans" / "random-0.5.json").is_file()


def test_python_m_ends_an_error_without_a_traceback(tmp_path: Path) -> None:
    done = python_m("run", tmp_path / "missing.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/missing.yaml: 1 problem\n")
    assert "Traceback" not in done.stderr


# --- run ---


def test_run_and_run_again(ok: Ok, config_file: Path) -> None:
    first, second = ok("run", config_file), ok("run", config_file)
    assert first.stdout == second.stdout
    assert "random (floor)" in first.stdout
    assert "calibrate: already done" in second.stderr


def test_run_of_another_configuration(ok: Ok, fails: Fails, config_file: Path) -> None:
    ok("run", config_file)
    change = ("--set", "experiment.seed=1")
    assert "different: experiment.seed" in fails(1, "run", config_file, *change)
    ok("run", config_file, *change, "--overwrite")


def test_dry_run_writes_nothing(ok: Ok, fails: Fails, config_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = ok("run", config_file, "--dry-run").stdout
    for words in ("192 tokens forward, 192 of them backward", "4 plans", "5 models x 128 tokens", "peak memory about"):
        assert words in text
    assert sorted(tmp_path.rglob("*")) == before
    ok("run", config_file)
    change = ("--set", "experiment.seed=1", "--dry-run")
    assert "another configuration" in fails(1, "run", config_file, *change)
    ok("run", config_file, *change, "--overwrite")


def test_all_problems_of_a_file_at_once(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {model_id: m}\npruning: {ratio: [0.1]}\nmetrics: {enabled: [wandas]}\n")
    text = fails(2, "run", path, "--set", "calibration.num_samples=0")
    assert "3 problems" in text
    assert "line 2: pruning.ratio: unknown key 'ratio'. Did you mean 'ratios'?" in text
    assert "line 3: metrics.enabled[0]: unknown metric 'wandas'. Did you mean 'wanda'?" in text
    assert "--set calibration.num_samples: calibration.num_samples: must be at least 1; got 0." in text


COMMANDS = {
    "score": ("-m", "wanda", "--out", "out"),
    "rank": ("-m", "wanda", "--out", "out.csv"),
    "prune": ("--sparsity", "0.5", "-m", "wanda", "--no-evaluate", "--out", "out"),
    "eval": ("--out", "out.csv"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("status", "options", "text"),
    [
        (2, ["--num-samples", "0"], "--num-samples must be at least 1; got 0."),
        (2, ["--max-length", "1"], "--max-length must be at least 2; got 1."),
        (2, ["--batch-size", "0"], "--batch-size must be at least 1; got 0."),
        (2, ["--text", "none.txt"], "none.txt does not exist"),
        (2, ["--text", "binary.txt"], "binary.txt is not UTF-8"),
        (2, ["--text", "rows.jsonl"], "rows.jsonl line 1 is not JSON"),
        (2, ["--text", "sotu", "--split", "trian"], "Unknown split of sotu 'trian'. Did you mean 'train'"),
        (1, [], "already exists. Choose another --out"),
        (1, ["--overwrite", "--out", "file/x.csv"], "cannot write file: Not a directory."),
        (1, ["--overwrite", "--out", "/dev/null/x.csv"], "cannot write /dev/null: Not a directory."),
    ],
)
def test_faults_are_found_before_the_model_is_loaded(
    fails: Fails,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    status: int,
    options: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary.txt").write_bytes(b"\xff\xfe")
    Path("rows.jsonl").write_text("{")
    Path("file").touch()
    if not options:
        Path("out.csv").touch()
        Path("out").mkdir()
        Path("out", "mine").touch()
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    assert text in fails(status, command, checkpoint, *COMMANDS[command], *options)


@pytest.mark.parametrize("command", ["score", "rank", "prune"])
def test_a_wrong_parameter_is_found_before_the_model_is_loaded(
    fails: Fails, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    options = ("-m", "random", "--param", "random.seed=x")
    name = [value for value in COMMANDS[command] if value not in ("-m", "wanda")]
    assert "--param random.seed: expected a whole number; got 'x'." in fails(2, command, checkpoint, *name, *options)


@pytest.mark.parametrize("key", ["dataset.name", "evaluation.name"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_missing_text_of_a_run_is_found_before_the_model_is_loaded(
    fails: Fails, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr("ffnscope.run.runner.load_model", None)
    monkeypatch.setattr("ffnscope.run.estimate.load_to_estimate", None)
    assert "none.txt does not exist" in fails(2, "run", config_file, "--set", f"{key}=./none.txt", *more)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_nan(tmp_path: Path) -> Callable[[str], Path]:
    """Make a checkpoint with NaN in one weight."""

    def make(name: str) -> Path:
        folder = make_checkpoint(tmp_path / "broken")
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_nan_in_a_checkpoint_ends_with_1(fails: Fails, config_file: Path, with_nan: Callable[[str], Path]) -> None:
    folder = with_nan("model.layers.1.mlp.down_proj.weight")
    text = fails(1, "run", config_file, "--set", f"model.model_id={folder}")
    assert text.count("error: ") == 1
    assert "model.layers.1.mlp is NaN or infinite" in text


UP, ATTENTION = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("metric", "name"), [("magnitude", UP), ("wanda", ATTENTION), ("scar_loss_proxy", UP), ("sparsegpt", ATTENTION)]
)
def test_every_command_names_the_weight_that_is_nan(
    fails: Fails, texts: Path, tmp_path: Path, with_nan: Callable[[str], Path], command: str, metric: str, name: str
) -> None:
    options = [metric if option == "wanda" else option for option in COMMANDS[command]]
    options += ["--text", texts / "train.txt", *SMALL, "--out", tmp_path / "out.csv"]
    text = fails(1, command, with_nan(name), *options)
    assert text.count(f"weight {name} holds NaN or infinity") == 1
    assert "again from an intact checkpoint." in text
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_ends_with_1(fails: Fails, config_file: Path) -> None:
    assert "Use device: auto or cpu." in fails(1, "run", config_file, "--set", "experiment.device=cuda")


def test_ctrl_c_ends_with_130(fails: Fails, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "observe_batch", stop)
    said = fails(130, "run", config_file)
    assert "interrupted. Called again, `run`, `score`, `prune`, " in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [["metrics"], ["metrics", "--json"], ["--version"], ["metrics", "--help"]])
def test_what_cannot_be_printed_ends_without_a_traceback(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ffnscope", *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device.\n"


# --- looking ---


def test_inspect(ok: Ok, fails: Fails, checkpoint: Path) -> None:
    text = ok("inspect", checkpoint).stdout
    assert "model.layers.1.mlp" in text
    assert f"LlamaForCausalLM: {LAYERS} FFNs, {LAYERS * D_FF} channels" in text
    found = json.loads(ok("inspect", checkpoint, "--json", "--tracked", "layers.1.mlp.down_proj").stdout)
    assert (found["model_class"], found["model_type"], found["refused"]) == ("LlamaForCausalLM", "llama", [])
    (row,) = found["sites"]
    assert (row["name"], row["expert"], row["fused"]) == ("model.layers.1.mlp", None, None)
    assert (row["layer"], row["gate"], row["d_model"], row["d_ff"]) == (1, "gate_proj", HIDDEN, D_FF)
    assert "pattern 'nothing' matches no FFN" in fails(2, "inspect", checkpoint, "--tracked", "nothing")
    assert "error: nothing does not exist; model_id may be" in fails(2, "inspect", "./nothing")


def test_inspect_gpt2(ok: Ok, tmp_path: Path) -> None:
    text = ok("inspect", make_checkpoint(tmp_path / "gpt2", "gpt2")).stdout
    assert "transformer.h.0.mlp" in text
    assert "c_fc" in text


def saved(folder: Path, arch: str) -> Path:
    """A checkpoint of any architecture of `tiny_all`."""
    tiny_causal_lm(arch).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def test_inspect_tells_what_is_left_whole(ok: Ok, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "gemma3n_text")
    text = ok("inspect", folder).stdout
    assert "model.layers.1.mlp.down_proj" in text
    assert "its channels do not each depend on one output of gate and up alone" in text
    assert "Gemma3nForCausalLM: 2 FFNs, 336 channels, 2 left whole" in text
    found = json.loads(ok("inspect", folder, "--json").stdout)
    assert [row["path"] for row in found["refused"]] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def test_inspect_tells_of_helpers(ok: Ok, tmp_path: Path) -> None:
    text = ok("inspect", saved(tmp_path / "model", "xmod")).stdout
    assert "adapter_modules is a helper network" in text


@pytest.mark.parametrize(
    ("arch", "reason"),
    [("hrm_text, two cycles", "runs 4 times per forward"), ("zamba", "is used by 2 layers")],
)
def test_inspect_tells_of_several_uses(ok: Ok, tmp_path: Path, arch: str, reason: str) -> None:
    text = ok("inspect", saved(tmp_path / "model", arch)).stdout
    assert f"({reason})" in text


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("mamba", {}, "its layers are state-space mixers"),
        ("gemma3n_text", {"activation_sparsity_pattern": [0.9] * 4}, "its channels do not each depend on one output"),
    ],
)
def test_inspect_of_a_model_without_sites(
    fails: Fails, tmp_path: Path, arch: str, changes: dict[str, Any], reason: str
) -> None:
    folder = saved(tmp_path / "model", arch)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    assert reason in fails(2, "inspect", folder)


def test_inspect_of_a_block_that_layers_share(ok: Ok, tmp_path: Path) -> None:
    text = " ".join(ok("inspect", saved(tmp_path / "model", "zamba2")).stdout.split())
    assert "gate_up_proj (gate_up) + 2 adapters" in text
    assert "Zamba2ForCausalLM: 1 FFNs, 168 channels" in text


def test_metrics(ok: Ok) -> None:
    rows = json.loads(ok("metrics", "--json").stdout)
    assert [row["name"] for row in rows] == METRICS.names()
    by_name = {row["name"]: row for row in rows}
    assert by_name["random"]["parameters"] == {"seed": 0}
    assert (by_name["magnitude"]["cost"], by_name["magnitude"]["needs"]) == ("weights", [])
    assert by_name["scar_loss_proxy"]["cost"] == "backward"
    assert by_name["wanda"]["cost"] == "forward"
    text = ok("metrics").stdout
    for row in rows:
        assert row["name"] in text
        assert row["summary"] in text  # with its brackets: E[h^2] is no markup
        assert row["source"] in text
    assert any("E[" in row["summary"] for row in rows)
    assert "random seed=0" in text


def test_plan_show(ok: Ok, fails: Fails, plans: Path, tmp_path: Path) -> None:
    text = ok("plan", "show", plans / "a.json").stdout
    assert "model.layers.0.mlp" in text
    assert "25.0%" in text
    assert "metric weight_magnitude, allocator local, asked 0.25, got 0.2500" in text
    value = json.loads(ok("plan", "show", plans / "a.json", "--json").stdout)
    assert value["sparsity"] == 0.25
    row = {"site": "model.layers.0.mlp", "d_ff": D_FF, "width": 36, "sparsity": 0.25, "protected": 2}
    assert value["sites"][0] == row
    assert "does not exist" in fails(1, "plan", "show", tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"kind": "scores"}')
    assert "expected a file of kind 'plan'" in fails(1, "plan", "show", tmp_path / "x.json")


def test_plan_diff(ok: Ok, plans: Path) -> None:
    assert "Jaccard" in ok("plan", "diff", plans / "a.json", plans / "b.json").stdout
    rows = json.loads(ok("plan", "diff", plans / "a.json", plans / "b.json", "--json").stdout)
    assert [(row["width_a"], row["width_b"], row["only_b"]) for row in rows] == [(36, 24, 0)] * LAYERS
    assert rows[0]["jaccard"] == pytest.approx(24 / 36)


# --- score ---


def test_score(ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = ("-m", "wanda", "-m", "random", "--param", "random.seed=3", "--tracked", "model.layers.[1-1].mlp.up_proj")
    ok("score", checkpoint, *names, "--text", texts / "train.txt", "--out", out, *SMALL)
    assert {path.name for path in out.iterdir()} == {"scores.safetensors", "scores.json", "statistics.safetensors"}
    found, facts = read_scores(out / "scores.safetensors")
    assert [[site.layer for site in one.values] for one in found.values()] == [[1], [1]]
    assert found["random"].facts["params"] == {"seed": 3}
    assert facts["calibration"]["tokens"] == 4 * 32
    assert list(strict_json(out / "scores.json")["metrics"]) == ["wanda", "random"]


def test_score_goes_on_after_ctrl_c(
    ok: Ok, fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = calibrating.observe_batch, []
    options = ("score", checkpoint, "-m", "wanda", "--text", texts / "train.txt", "--num-samples", 40)
    options += ("--max-length", 32, "--batch-size", 8, "--out", tmp_path / "out")

    def stop_at_the_fifth(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(calibrating, "observe_batch", stop_at_the_fifth)
    fails(130, *options)
    left = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert left == ["calibrate.safetensors", "inputs.json", "score.part"]
    ok(*options)
    assert len(calls) == 4 + 1 + 1
    whole = (*options[:-1], tmp_path / "whole")
    ok(*whole)
    files = ("scores.safetensors", "statistics.safetensors")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no step"])
def test_a_damaged_state_of_an_interrupted_pass_is_told_and_made_again(
    ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path, damage: str
) -> None:
    options = ("score", checkpoint, "-m", "wanda", "--text", texts / "train.txt", *SMALL, "--out")
    ok(*options, tmp_path / "whole")
    part = tmp_path / "out" / "score.part" / "calibrate.safetensors"
    part.parent.mkdir(parents=True)
    stats, _ = read_stats(tmp_path / "whole" / "statistics.safetensors")
    write_stats(part, stats.values(), {"key": "k"})
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-7])
    elif damage == "foreign":
        part.write_bytes(b"{}")
    said = ok(*options, tmp_path / "out").stderr
    assert str(part) in said
    assert "It is deleted, and this stage starts anew." in said
    files = ("scores.safetensors", "statistics.safetensors")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-m", "wandas"], "Unknown metric 'wandas'. Did you mean 'wanda'?"),
        (["-m", "random", "--param", "random.sead=3"], "Did you mean 'seed'?"),
        (["-m", "random", "--param", "wanda.seed=3"], "Unknown metric of --param 'wanda'"),
        (["-m", "random", "--param", "seed=3"], "is not METRIC.NAME=VALUE"),
        (["-m", "random", "--param", "random.seed=x"], "--param random.seed: expected a whole number; got 'x'."),
        (["-m", "random", "--param", "random.seed=["], "--param random.seed=[: "),
        (["-m", "random", "--num-samples", "100000"], "windows of 512 tokens were asked of"),
        (["-m", "random", "--dtype", "int8"], "dtype 'int8' is not known"),
        (["-m", "random", "--device", "tpu"], "device"),
    ],
)
def test_score_refuses(
    fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path, options: list[str], text: str
) -> None:
    arguments = ("--text", texts / "train.txt", "--out", tmp_path / "out")
    assert text in fails(2, "score", checkpoint, *options, *arguments)
    assert not (tmp_path / "out").exists()


def test_score_refuses_an_existing_output(fails: Fails, ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    options = ("score", checkpoint, "-m", "random", "--text", texts / "train.txt", "--out", tmp_path / "out", *SMALL)
    assert "already exists" in fails(1, *options)
    ok(*options, "--overwrite")
    assert (tmp_path / "out" / "mine").exists()


# --- eval ---


def test_eval_of_plans(ok: Ok, checkpoint: Path, texts: Path, plans: Path, tmp_path: Path) -> None:
    options = ["eval", checkpoint, "--text", texts / "test.txt", *SMALL]
    options += ["--plan", plans / "a.json", "--plan", plans / "b.json"]
    text = ok(*options, "--out", tmp_path / "rows.json").stdout
    assert "Perplexity on" in text
    rows = strict_json(tmp_path / "rows.json")["rows"]
    assert [row["label"] for row in rows] == ["dense", "a", "b"]
    assert [row["sparsity"] for row in rows] == [0.0, 0.25, 0.5]
    assert rows[1]["kl_to_dense"] > 0
    ok(*options, "--out", tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open(newline="") as file:
        assert [float(row["perplexity"]) for row in csv.DictReader(file)] == [row["perplexity"] for row in rows]


def test_plans_of_one_name_are_told_apart_by_their_folders(
    ok: Ok, checkpoint: Path, texts: Path, plans: Path, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("x/one/a.json", "y/one/a.json", "y/two/a.json", "dense.json", "b.json")]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(plans / ("b.json" if i % 2 else "a.json"), file)
    options = [word for file in files for word in ("--plan", file)]
    ok("eval", checkpoint, "--text", texts / "test.txt", *SMALL, *options, "--out", tmp_path / "rows.json")
    rows = strict_json(tmp_path / "rows.json")["rows"]
    labels = ["dense", "x/one/a", "y/one/a", "two/a", f"{tmp_path.name}/dense", "b"]
    assert [row["label"] for row in rows] == labels
    assert [row["sparsity"] for row in rows] == [0.0, 0.25, 0.5, 0.25, 0.5, 0.25]


def test_plans_that_differ_only_in_their_suffix(plans: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "a.plan")]
    for file in files:
        shutil.copy(plans / "a.json", file)
    assert list(read_plans(files)) == [str(file.resolve()) for file in files]


def test_eval_of_a_shipped_text_takes_its_held_out_split(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    ok("eval", checkpoint, "--text", "pydoc_topics", *SMALL, "--out", tmp_path / "rows.json")
    (row,) = strict_json(tmp_path / "rows.json")["rows"]
    assert "split test" in row["dataset"]
    assert row["n_tokens"] == 4 * 31


def test_eval_refuses(fails: Fails, checkpoint: Path, texts: Path, plans: Path, tmp_path: Path) -> None:
    options = ("eval", checkpoint, "--text", texts / "test.txt", *SMALL)
    assert "must end in .csv or .json" in fails(2, *options, "--out", tmp_path / "rows.txt")
    (tmp_path / "rows.csv").touch()
    assert "already exists" in fails(1, *options, "--out", tmp_path / "rows.csv")
    again = plans / ".." / plans.name / "a.json"
    twice = ("--plan", plans / "a.json", "--plan", again)
    assert f"--plan {again} is given twice; name each plan once." in fails(2, *options, *twice)
    assert "does not exist" in fails(1, *options, "--plan", tmp_path / "a.json")


def test_eval_refuses_a_plan_of_another_model(fails: Fails, texts: Path, plans: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", intermediate_size=64)
    options = ("--text", texts / "test.txt", "--plan", plans / "a.json", *SMALL)
    assert "a: the plan was made for model.layers.0.mlp with 48 channels" in fails(2, "eval", other, *options)
    assert read_plan(plans / "a.json").sparsity == 0.25
