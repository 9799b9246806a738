"""What a YAML with a reconstruction calibrates on where it does not say: the same as the command prune."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from typer.main import get_command

import ffnscope
from ffnscope.apply.few_tokens import few_tokens, tokens_wanted
from ffnscope.apply.method import METHODS
from ffnscope.cli import app
from ffnscope.cli import options as opt
from ffnscope.cli.prune_texts import calibration_of
from ffnscope.run import config_from_dict
from ffnscope.run.choices import pass_options
from ffnscope.run.defaults import enough_windows
from ffnscope.run.folder import CONFIG, differing
from ffnscope.run.load import dump_config
from ffnscope.run.texts import SHIPPED_TEXTS
from ffnscope.run.windows import calibration_source, sized
from runs import quiet_run, small_run
from tiny import D_FF
from tiny_moe import tiny_moe

BEST = {"enabled": True, "ratios": [0.5], "method": "best"}
OWN = {"num_samples": 16, "max_length": 32}


def config(**blocks: Any) -> Any:
    return config_from_dict({"model": {"model_id": "m"}, "pruning": BEST, **blocks})


def by_command(method: str, *arguments: str) -> Any:
    """The calibration of ``ffnscope prune m --method ...``."""
    command = get_command(app).commands["prune"]  # type: ignore[attr-defined]
    with click.Context(command) as context:
        command.parse_args(context, ["m", "--sparsity", "0.5", "--out", "o", "--method", method, *arguments])
        names = ("text", "split", "mix", "num_samples", "max_length", "batch_size", "seed")
        text = opt.TextChoice(**{name: context.params[name] for name in names})
        return calibration_of(context, text, METHODS[method])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["best", "scores"])
def test_the_yaml_is_the_command(method: str) -> None:
    asked, command = config(pruning={**BEST, "method": method}), by_command(method)
    assert calibration_source(asked) == command.source
    found = (asked.num_samples, asked.max_length, asked.seed, asked.grows)
    assert found == (command.n, command.length, command.seed, command.grows)
    assert found[:2] == ((128, 256) if method == "best" else (64, 512))
    assert pass_options(asked).gradient_windows == (128 if method == "best" else 64)


def test_what_is_given_stays() -> None:
    asked = config(dataset={"name": "pydoc_topics"}, calibration=OWN, metrics={"scar": {"num_samples": 5}})
    assert (asked.num_samples, asked.max_length, asked.scar_num_samples, asked.grows) == (16, 32, 5, False)
    assert asked.dataset.mix == () and asked.evaluation.max_length == 32
    assert by_command("best", "--text", "pydoc_topics").source.parts == calibration_source(asked).parts
    assert config(dataset={"mix": []}).dataset.mix == () == config(dataset={"split": "validation"}).dataset.mix


@pytest.mark.parametrize("pruning", [{**BEST, "enabled": False}, {**BEST, "reconstruct": "none"}])
def test_nothing_changes_without_a_reconstruction(pruning: dict[str, Any]) -> None:
    asked = config(pruning=pruning)
    sizes = (asked.calibration.num_samples, asked.calibration.max_length, asked.metrics.scar.num_samples)
    assert sizes == (64, 512, 64) and asked.dataset.mix == () and not asked.grows


def test_a_bias_needs_no_tokens_per_channel() -> None:
    asked = config(pruning={**BEST, "method": "scores", "algorithms": ["wanda"], "reconstruct": "bias"})
    assert (asked.calibration.num_samples, asked.grows) == (128, False)


def test_analyses_keep_all_gradients() -> None:
    asked = config(concentration={"enabled": True, "jackknife": True})
    assert asked.scar_num_samples == asked.num_samples == 128 and asked.metrics.scar.num_samples is None


def test_every_method_is_measured_on_the_same_windows() -> None:
    one, other = config(), config(pruning={**BEST, "method": "scores"})
    assert one.evaluation == other.evaluation and one.evaluation.max_length == 512


def test_the_resolved_configuration_is_read_back() -> None:
    asked = config()
    assert [text.name for text in asked.dataset.mix] == [name for name in SHIPPED_TEXTS if name != "sotu"]
    again = config_from_dict(yaml.safe_load(dump_config(asked)))
    assert again == asked and again.calibration.num_samples is None


class TestWidths:
    """As many windows as give the widest FFN 4 tokens per channel."""

    def test_dense(self, checkpoint: Path) -> None:
        model = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu")).model
        sites = ffnscope.find_sites(model)
        assert tokens_wanted(model, sites) == 4 * D_FF
        assert [enough_windows(model, sites, length) for length in (1, 2, 256)] == [4 * D_FF, 128, 128]
        assert few_tokens(model, sites, 4 * D_FF) is None
        told = few_tokens(model, sites, 4 * D_FF - 1)
        assert told is not None and told.endswith(f"{4 * D_FF} tokens of text would do")
        assert f"2 of 2 FFNs will be fitted on fewer tokens than 4 d_ff (model.layers.0.mlp: {4 * D_FF - 1}" in told

    def test_experts_share_the_tokens(self) -> None:
        model = tiny_moe("mixtral")
        sites = ffnscope.find_sites(model)
        experts = max(site.expert or 0 for site in sites) + 1
        share = model.config.num_experts_per_tok / experts
        assert tokens_wanted(model, sites) == round(4 * sites[0].d_ff / share) > 4 * sites[0].d_ff
        assert "about" in str(few_tokens(model, sites, 4 * sites[0].d_ff))

    def test_a_run_says_what_it_took(
        self, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ffnscope.run import defaults

        small = defaults.TextDefaults(6, 16, 4, True)
        monkeypatch.setattr(defaults, "REFITTING", small)
        asked = small_run(checkpoint, texts, tmp_path / "out", pruning={**BEST, "algorithms": ["obs_loss"]})
        del asked["calibration"]["num_samples"], asked["calibration"]["max_length"]
        asked["evaluation"]["max_length"] = 32
        run = config_from_dict(asked)
        found = quiet_run(run)
        saved = yaml.safe_load((found.folder / CONFIG).read_text())
        assert saved["calibration"]["num_samples"] == 4 * D_FF // 16 == 12
        assert saved["metrics"]["scar"]["num_samples"] == 4
        assert found.reconstructions["obs_loss-0.5"].facts["tokens"] == 4 * D_FF
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = quiet_run(run)  # the same file goes on, also where its number was left to the model
        kept = (found.plans["obs_loss-0.5"].kept, again.plans["obs_loss-0.5"].kept)
        assert all(torch.equal(index, kept[1][site]) for site, index in kept[0].items())
        assert quiet_run(config_from_dict(saved)).folder == found.folder

    def test_a_shorter_text_is_taken_whole(self, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
        loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
        sites = ffnscope.find_sites(loaded.model)
        text = (texts / "train.txt").read_text()
        (tmp_path / "short.txt").write_text(text[:4000])
        whole = ffnscope.load_windows(
            ffnscope.TextSource(str(tmp_path / "short.txt")), loaded.tokenizer, n=None, length=2
        )
        assert len(whole) > 128
        asked = config(dataset={"name": str(tmp_path / "short.txt")}, evaluation={"name": "sotu"})
        asked = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"max_length": 2})})
        wide = [ffnscope.FFNSite(0, "m", None, "up", "down", 8, 10**6)]
        found, windows = sized(asked, loaded, wide)
        assert len(windows) == found.calibration.num_samples == len(whole)
        assert sized(asked, loaded, sites)[0].calibration.num_samples == 128


def test_a_number_left_to_the_model_is_no_other_configuration() -> None:
    null, number = ({"calibration": {"num_samples": n, "max_length": 256}} for n in (None, 224))
    assert differing(number, null) == [] and differing(null, number) == ["calibration.num_samples"]
