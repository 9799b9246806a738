"""Options of the command line that say how a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ffnscope.cli.groups import option_names
from ffnscope.cli.options import Loading
from ffnscope.errors import ModelError, UsageError
from ffnscope.io import read_scores

Ok = Callable[..., Result]
Fails = Callable[..., str]


@pytest.mark.parametrize("command", ["inspect", "score", "rank", "prune", "eval"])
def test_every_command_with_a_model_has_them(ok: Ok, command: str) -> None:
    text = ok(command, "--help").stdout
    assert all(f"--{name.replace('_', '-')}" in text for name in option_names(Loading))


def test_they_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    places: Any = {"device_map": "auto", "max_memory": ["0=20GiB", "cpu=1000"], "offload_folder": "off"}
    hub: Any = {"revision": "v1", "cache_dir": "hub", "token_env": "MY_TOKEN", "offline": True}
    source = Loading(trust_remote_code=True, allow_pickle=True, **places, **hub).source("m")
    assert (source.revision, source.device_map, source.offload_folder, source.cache_dir) == ("v1", "auto", "off", "hub")
    assert source.max_memory == {"0": "20GiB", "cpu": "1000"}
    assert source.offline and source.allow_pickle and source.trust_remote_code and source.token == "hf_secret"


def test_a_model_on_disk_is_scored_like_a_resident_one(ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    text: Any = ("--text", texts / "train.txt", "--num-samples", 2, "--max-length", 32, "--metric", "wanda")
    ok("score", checkpoint, *text, "--out", tmp_path / "a", "--device", "cpu")
    ok("score", checkpoint, *text, "--out", tmp_path / "b", "--device-map", "auto", "--max-memory", "cpu=60KB")
    (a, facts), (b, _) = (read_scores(tmp_path / name / "scores.safetensors") for name in "ab")
    assert all((values == b["wanda"].values[site]).all() for site, values in a["wanda"].values.items())
    assert (facts["model_id"], facts["revision"]) == (str(checkpoint), None)


def test_offline(fails: Fails, tmp_path: Path) -> None:
    text = fails(2, "inspect", "tiny/none", "--offline", "--cache-dir", tmp_path)
    assert "error: cannot load 'tiny/none': it is not in the cache, and offline mode is on." in text


def test_pickle(ok: Ok, fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert "set model.allow_pickle (--allow-pickle)" in fails(2, "inspect", copy)
    assert len(json.loads(ok("inspect", copy, "--allow-pickle", "--json").stdout)["sites"]) == 2


class TestWhatCannotBe:
    def source(self, **options: Any) -> Any:
        return Loading(**options).source("m")

    @pytest.mark.parametrize("limit", ["8GiB", "=8GiB", "0="])
    def test_no_limit(self, limit: str) -> None:
        with pytest.raises(UsageError, match=rf"--max-memory '{limit}' is not DEVICE=SIZE, for example 0=20GiB"):
            self.source(device_map="auto", max_memory=[limit])

    def test_no_size(self) -> None:
        with pytest.raises(UsageError, match="max_memory of '0' must be bytes or text such as '8GiB'; got 'much'"):
            self.source(device_map="auto", max_memory=["0=much"])

    def test_without_a_device_map(self) -> None:
        with pytest.raises(UsageError, match="offload_folder would do nothing without device_map"):
            self.source(offload_folder="here")

    def test_no_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MY_TOKEN", raising=False)
        with pytest.raises(
            ModelError, match=r"variable MY_TOKEN \(model.token_env\) should hold a token, but is not set"
        ):
            self.source(token_env="MY_TOKEN")


def test_beside_scores_that_are_there(fails: Fails, tmp_path: Path) -> None:
    assert "--revision would do nothing with --scores" in fails(2, "rank", "--scores", tmp_path, "--revision", "v1")
