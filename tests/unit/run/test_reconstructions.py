"""Runs that reconstruct what they prune: stages, labels, files, resuming, and what a configuration is refused for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import ffnscope
from faults import stop_at
from ffnscope.apply import sequential
from ffnscope.apply.pruned import plan_of
from ffnscope.errors import UsageError
from ffnscope.io import read_plan
from ffnscope.run import config_from_dict, rounds
from ffnscope.run.dry_run import dry_run
from ffnscope.run.stages import HELD_OUT
from runs import quiet_run, results, small_run, strict_json
from tiny import LAYERS

LABEL = "scar_loss_proxy-0.5"


def config(checkpoint: Path, texts: Path, out: Path, pruning: dict[str, Any] | None = None, **changes: Any) -> Any:
    asked = small_run(checkpoint, texts, out, calibration={"num_samples": 16}, **changes)
    asked["pruning"] = {"enabled": True, "ratios": [0.5], **(pruning or {"method": "best"})}
    asked["metrics"] = {"scar": {"enabled": True}}
    return config_from_dict(asked)


def test_best(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    output = {"checkpoints": True, "report": True}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", output=output))
    assert [row.metric for row in found.rows] == [None, "scar_loss_proxy + sequential refit"]
    assert "scar_loss_proxy + sequential refit" in (found.folder / "results.md").read_text()
    page = (found.folder / "report.html").read_text()
    assert "scar_loss_proxy + sequential refit" in page and "Where the damage is" in page
    plan, refit = found.plans[LABEL], found.reconstructions[LABEL]
    assert (plan.metric, plan.allocator, refit.facts["target"]) == ("scar_loss_proxy", "halfway", 0.35)
    told = strict_json(found.folder / "summary.json")["plans"][LABEL]
    assert told == {"sparsity": 0.5, "metric": "scar_loss_proxy", "reconstruction": "sequential refit"}
    errors = strict_json(found.folder / "reconstructions" / f"{LABEL}.json")["rows"]
    assert [row["width"] for row in errors] == list(plan.widths.values())
    profile = strict_json(found.folder / "analysis" / "error_profile.json")["rows"]
    assert [row["error"] for row in profile] == [row["error"] for row in errors]
    assert [row["layer"] for row in profile] == [0, 1]
    assert not (found.folder / "reconstructions" / f"{LABEL}.part").exists()
    folder = found.folder / "checkpoints" / LABEL
    assert read_plan(folder / "ffnscope_plan.json").provenance["reconstruction"]["method"] == "sequential"
    model = ffnscope.load_model(ffnscope.ModelSource(str(folder), device="cpu"))
    text = ffnscope.TextSource(str(texts / "test.txt"))
    after = ffnscope.perplexity(model.model, ffnscope.load_windows(text, model.tokenizer, n=4, length=32, seed=42))
    assert after.value == pytest.approx(found.rows[1].results[0].value, rel=1e-5)


def test_distilled(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = {"method": "best", "distill": 3}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", asked, output={"report": True}))
    label = "scar_loss_proxy + sequential refit, distilled (trained)"
    assert [row.metric for row in found.rows] == [None, label]
    for page in ("results.md", "report.html"):
        assert label in (found.folder / page).read_text()
    refit = found.reconstructions[LABEL]
    assert refit.facts["trained"] is True and refit.facts["distillation"]["epochs"] == 3 and refit.rows
    told = strict_json(found.folder / "summary.json")["plans"][LABEL]
    assert told["reconstruction"] == "sequential refit, distilled (trained)"


def test_one_shot_reads_the_one_pass(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = {"algorithms": ["wanda", "random"], "reconstruct": "one_shot", "damping": 0.1}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", asked))
    assert [row.metric for row in found.rows[1:]] == ["wanda + one-shot refit", "random + one-shot refit"]
    stats, _ = ffnscope.read_stats(found.folder / "statistics.safetensors")
    assert set(next(iter(stats.values())).values) > {"act_sq", "h_outer"}
    model = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu")).model
    expected = ffnscope.reconstruct(model, found.plans["wanda-0.5"], stats, damping=0.1)
    for site, down in found.reconstructions["wanda-0.5"].down.items():
        assert torch.equal(down, expected.down[site])


def test_one_shot_chooses_its_damping(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = {"algorithms": ["wanda", "random"], "reconstruct": "one_shot"}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", asked))
    ledger = strict_json(found.folder / "ledger.json")["stages"]
    assert list(ledger["calibrate held out"]["files"]) == ["statistics_held_out.safetensors"]
    whole, held = (ffnscope.read_stats(found.folder / f"{n}.safetensors")[0] for n in ("statistics", HELD_OUT))
    assert {one.n_tokens for one in held.values()} == {2 * 32} and set(next(iter(held.values())).values) == {"h_outer"}
    model = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu")).model
    for label, plan in found.plans.items():
        expected = ffnscope.reconstruct(model, plan, whole, held_out=held)
        assert found.reconstructions[label].facts["sites"] == expected.facts["sites"]
        assert all(torch.equal(down, expected.down[s]) for s, down in found.reconstructions[label].down.items())
    profile = strict_json(found.folder / "analysis" / "error_profile.json")["rows"]
    assert all(row["held_out"] for row in profile)
    # another cut reads the same sums
    record = ffnscope.run.find_record(found.folder, "wanda")
    again = ffnscope.recut(model, record, 0.5)
    assert isinstance(again, ffnscope.Reconstruction)
    assert all(torch.equal(down, again.down[s]) for s, down in found.reconstructions["wanda-0.5"].down.items())
    # a given damping needs none
    fixed = quiet_run(config(checkpoint, texts, tmp_path / "out", {**asked, "damping": 0.1}), overwrite=True)
    assert not (fixed.folder / f"{HELD_OUT}.safetensors").exists()
    record = ffnscope.run.find_record(fixed.folder, "wanda")
    with pytest.warns(UserWarning, match="no statistics of held-out windows, which choose the damping: it is 0.01"):
        refit = ffnscope.recut(model, record, 0.5, method=ffnscope.Method("wanda", "local", "one_shot"))
    assert isinstance(refit, ffnscope.Reconstruction) and refit.facts["damping"] == "0.01, no tokens held out"


@pytest.mark.parametrize("reconstruct", ["none", "one_shot", "sequential"])
def test_rounds(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reconstruct: str
) -> None:
    asked = {"algorithms": ["wanda", "obs"], "reconstruct": reconstruct, "rounds": 2, "allocator": "halfway"}
    unbroken = quiet_run(config(checkpoint, texts, tmp_path / "unbroken", asked))
    plans = unbroken.plans
    assert [plan.sparsity for plan in plans.values()] == [0.5, 0.5]
    assert all(plan.provenance["rounds"] == [pytest.approx(1 - 0.5**0.5), 0.5] for plan in plans.values())
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    text = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(text, loaded.tokenizer, n=16, length=32, seed=42)
    method = ffnscope.Method("obs", "halfway", reconstruct, rounds=2)  # type: ignore[arg-type]
    options = ffnscope.PassOptions(batch_size=2)
    python = plan_of(ffnscope.plan_and_reconstruct(loaded.model, windows, 0.5, method=method, options=options))
    assert all(torch.equal(kept, python.kept[site]) for site, kept in plans["obs-0.5"].kept.items())
    with monkeypatch.context() as patch:
        stop_at(patch, rounds, "calibrate_all", 2)  # in the second plan
        with pytest.raises(KeyboardInterrupt):
            quiet_run(config(checkpoint, texts, tmp_path / "out", asked))
    with monkeypatch.context() as patch:
        calls = stop_at(patch, rounds, "calibrate_all", 0)
        found = quiet_run(config(checkpoint, texts, tmp_path / "out", asked))
    assert len(calls) == 1 and not list(tmp_path.glob("out/plans/*.part"))
    assert results(found.folder) == results(unbroken.folder)
    out = Console(file=io.StringIO(), width=200)
    dry_run(config(checkpoint, texts, tmp_path / "out", asked), out)
    assert "2 more calibrations, of what is left" in out.file.getvalue()  # type: ignore[attr-defined]


def test_only_what_changed_is_done_again(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ledger() -> dict[str, Any]:
        return strict_json(tmp_path / "out" / "ledger.json")["stages"]

    quiet_run(config(checkpoint, texts, tmp_path / "out"))
    first = ledger()
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "fit_columns", None)
        quiet_run(config(checkpoint, texts, tmp_path / "out"))
    assert ledger() == first
    quiet_run(config(checkpoint, texts, tmp_path / "out", {"method": "best", "target": 1.0}), overwrite=True)
    second = ledger()
    same = {name for name in first if first[name]["key"] == second[name]["key"]}
    assert {"calibrate", "score"} <= same
    assert not {f"reconstruct {LABEL}", "evaluate 1", "samples"} & same
    quiet_run(config(checkpoint, texts, tmp_path / "out", {"method": "best", "reconstruct": "none"}), overwrite=True)
    assert f"reconstruct {LABEL}" not in ledger()
    assert not (tmp_path / "out" / "reconstructions" / f"{LABEL}.safetensors").exists()


def test_an_interrupted_run_ends_as_if_it_never_was(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = results(quiet_run(config(checkpoint, texts, tmp_path / "unbroken")).folder)
    real, calls = sequential.fit_columns, []

    def stops(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sequential, "fit_columns", stops)
    with pytest.raises(KeyboardInterrupt):
        quiet_run(config(checkpoint, texts, tmp_path / "out"))
    assert (tmp_path / "out" / "reconstructions" / f"{LABEL}.part").is_dir()
    assert results(quiet_run(config(checkpoint, texts, tmp_path / "out")).folder) == unbroken
    assert len(calls) == 1 + LAYERS


def test_the_dry_run(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    dry_run(config(checkpoint, texts, tmp_path / "out"), console)
    assert "1 plans x 1,024 tokens forward, block by block" in console.export_text()
    dry_run(config(checkpoint, texts, tmp_path / "out", {"algorithms": ["wanda"], "reconstruct": "one_shot"}), console)
    told = console.export_text()
    assert "1 pass: 64 tokens forward, for the damping" in told and "damping chosen on held-out windows" in told
    dry_run(
        config(
            checkpoint, texts, tmp_path / "out", {"algorithms": ["wanda"], "reconstruct": "one_shot", "damping": 0.1}
        ),
        console,
    )
    told = console.export_text()
    assert "held-out windows" not in told and "FFNs, damping 0.1" in told
    dry_run(config(checkpoint, texts, tmp_path / "out", {"method": "best", "distill": 4}), console)
    assert "1 plans x up to 4 epochs in each FFN (trained)" in console.export_text()


@pytest.mark.parametrize(
    ("pruning", "text"),
    [
        ({"method": "bset"}, "pruning.method"),
        ({"reconstruct": "one-shot"}, "pruning.reconstruct"),
        ({"target": 0.5}, "pruning.target: would do nothing with 'reconstruct: none'"),
        ({"reconstruct": "one_shot", "target": 0.5}, "would do nothing with 'reconstruct: one_shot'"),
        ({"damping": 0.1}, "pruning.damping: would do nothing"),
        ({"distill": 2}, "pruning.distill: would do nothing with 'reconstruct: none'"),
        ({"reconstruct": "one_shot", "distill": 2}, "pruning.distill: would do nothing"),
        ({"method": "best", "distill": 0}, "pruning.distill"),
        ({"method": "best", "damping": 0.0}, "pruning.damping"),
        ({"method": "best", "target": 1.5}, "pruning.target"),
        ({"rounds": 2, "ratios": [0.5, 0.0]}, "pruning.ratios[1]: 0 leaves nothing for 'rounds: 2' to remove"),
        ({"method": "best", "ratios": [0.0, 0.5]}, "pruning.ratios[0]: 0 leaves nothing for 'reconstruct: sequential'"),
    ],
)
def test_refused(checkpoint: Path, texts: Path, tmp_path: Path, pruning: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as error:
        config(checkpoint, texts, tmp_path / "out", pruning)
    assert text in str(error.value)


def test_widths_that_the_format_cannot_hold(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'halfway' gives FFNs different widths"):
        config(checkpoint, texts, tmp_path / "out", output={"checkpoints": True, "format": "gguf"})
