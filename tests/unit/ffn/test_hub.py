"""Loading from a hub that runs on this machine and refuses as the real one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from checkpoints import make_checkpoint
from ffnscope.errors import ModelError
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model
from hub import COMMIT, Hub, serving
from tiny import logits


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories ``llama``, ``pickle`` (no safetensors) and ``empty``."""
    root = tmp_path_factory.mktemp("repositories")
    make_checkpoint(root / "llama")
    make_checkpoint(root / "pickle")
    (root / "pickle" / "model.safetensors").unlink()
    (root / "pickle" / "pytorch_model.bin").write_bytes(b"no pickle")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def hub(repositories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # the client reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(repositories) as found:
        point_at(monkeypatch, found.url)
        yield found


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from transformers.utils.hub import hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api(), "endpoint", url)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "hub")


def load(name: str, folder: str, **options: Any) -> LoadedModel:
    return load_model(ModelSource(f"tiny/{name}", device="cpu", cache_dir=folder, **options))


def failure(name: str, folder: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(name, folder, **options)
    return str(caught.value)


class TestLoading:
    @pytest.mark.parametrize("revision", [None, "main", COMMIT])
    def test_a_model_of_one_commit(self, hub: Hub, folder: str, repositories: Path, revision: str | None) -> None:
        loaded = load("llama", folder, revision=revision)
        assert torch.equal(logits(loaded.model), logits(load_model(str(repositories / "llama")).model))
        assert loaded.revision == COMMIT
        assert loaded.facts == {"model_id": "tiny/llama", "revision": COMMIT}
        weights = [path for path in hub.requests if path.endswith("model.safetensors")]
        assert weights and all(COMMIT in path for path in weights)

    def test_a_local_model_has_no_commit(self, repositories: Path) -> None:
        path = str(repositories / "llama")
        assert load_model(path).facts == {"model_id": path, "revision": None}

    def test_offline_from_the_cache(self, hub: Hub, folder: str) -> None:
        first = load("llama", folder)
        hub.requests.clear()
        second = load("llama", folder, offline=True)
        assert hub.requests == []
        assert second.revision == COMMIT and torch.equal(logits(second.model), logits(first.model))

    def test_the_cache_folder(self, hub: Hub, folder: str) -> None:
        load("llama", folder)
        assert list(Path(folder).glob("models--tiny--llama/snapshots/*/model.safetensors"))

    def test_the_token_is_sent_and_never_shown(self, hub: Hub, folder: str) -> None:
        source = ModelSource("tiny/llama", device="cpu", cache_dir=folder, token="hf_secret")
        load_model(source)
        assert hub.tokens - {None} == {"Bearer hf_secret"}
        assert "hf_secret" not in repr(source)
        assert "hf_secret" not in failure("gated", folder, token="hf_secret")


class TestRefusals:
    def test_gated(self, hub: Hub, folder: str) -> None:
        text = failure("gated", folder)
        assert text.startswith(
            "cannot load 'tiny/gated': it is gated, and you are not logged in. Accept its licence at"
        )
        assert f"{hub.url}/tiny/gated, then log in with `hf auth login`, or let HF_TOKEN (model.token_env)" in text

    def test_gated_for_this_account(self, hub: Hub, folder: str) -> None:
        assert "it is gated, and your account has no access yet. Accept its" in failure("not-granted", folder)

    @pytest.mark.parametrize("name", ["missing", "no-such-model"])
    def test_missing(self, hub: Hub, folder: str, name: str) -> None:
        text = failure(name, folder)
        assert "the hub knows no such model, or it is private. Look for a misspelling at" in text

    def test_a_token_that_the_hub_refuses(self, hub: Hub, folder: str) -> None:
        text = failure("bad-token", folder)
        assert "the hub refuses the token (401). Log in again with `hf auth login`, or correct HF_TOKEN." in text

    def test_an_unknown_revision(self, hub: Hub, folder: str) -> None:
        text = failure("llama", folder, revision="v7")
        assert f"it has no such revision. Look at {hub.url}/tiny/llama/tree/main for branches" in text

    def test_a_broken_hub(self, hub: Hub, folder: str) -> None:
        text = failure("broken", folder)
        assert f"the hub at {hub.url} answers 501, and the model is not in the cache. Check the network" in text

    def test_no_checkpoint(self, hub: Hub, folder: str) -> None:
        assert "it has no config.json, so it is no checkpoint of transformers" in failure("empty", folder)

    def test_pickle(self, hub: Hub, folder: str) -> None:
        assert "its weights are pickle files (pytorch_model.bin)" in failure("pickle", folder)
        assert not any(path.endswith("pytorch_model.bin") for path in downloaded(folder))

    def test_offline_and_not_in_the_cache(self, hub: Hub, folder: str) -> None:
        text = failure("llama", folder, offline=True)
        assert "it is not in the cache, and offline mode is on. Load it once with a network (`hf download tiny" in text
        assert hub.requests == []

    def test_offline_and_partly_in_the_cache(self, hub: Hub, folder: str) -> None:
        load("llama", folder)
        for path in Path(folder).rglob("tokenizer.json"):
            path.unlink()
        text = failure("llama", folder, offline=True)
        assert "Perhaps not all its files are in the cache. Load it once with a network" in text

    @pytest.mark.slow  # the client tries again for 23 seconds
    def test_no_network(self, hub: Hub, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        point_at(monkeypatch, "http://127.0.0.1:9")
        text = failure("llama", folder)
        assert "the hub at http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused)" in text


def downloaded(folder: str) -> list[str]:
    return [str(path) for path in Path(folder).rglob("*") if path.is_file()]
