"""A checkpoint of ours that has lost a bit is refused; those of others, and what is saved again, are not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ffnscope
from checkpoints import make_checkpoint, small_tokenizer
from ffnscope.apply.write_pruned import Destination, write_pruned
from ffnscope.errors import FFNScopeError, ModelError
from ffnscope.ffn.checksums import KEY, add_checksum, check_files
from tiny import logits, tiny


def _known(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(KEY)


def _payload(path: Path) -> int:
    """Where the values begin."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _flip(path: Path, place: int, bit: int = 6) -> None:
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1 << bit
    path.write_bytes(changed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A pruned checkpoint of several files."""
    model = tiny("llama", vocab_size=len(small_tokenizer()))
    plan = ffnscope.build_plan(ffnscope.score(model, ffnscope.find_sites(model), "weight_magnitude"), 0.5)
    ffnscope.prune_(model, plan)
    ffnscope.save_model(model, small_tokenizer(), tmp_path / "pruned", plan=plan, max_shard_size="20KB")
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    return tmp_path / "pruned"


def test_values_and_metadata_stay_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(3, 5), "größe": torch.arange(7, dtype=torch.int8), "b": torch.randn(9).bfloat16()}
    save_file(tensors, path, metadata={"format": "pt"})
    add_checksum(path)
    first = path.read_bytes()
    found = load_file(path)
    assert set(found) == set(tensors) and all(torch.equal(found[name], value) for name, value in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt" and len(file.metadata()[KEY]) == 8
    add_checksum(path)
    assert path.read_bytes() == first


def test_any_flipped_bit_is_refused(saved: Path) -> None:
    """In names, shapes and values, at random places of all files, by us or by safetensors."""
    random_ = random.Random(0)
    files = sorted(saved.glob("*.safetensors"))
    ffnscope.load_model(str(saved))
    for i in range(24):
        path = random_.choice(files)
        whole, start = path.read_bytes(), _payload(path)
        in_name = whole.index(b'":{"dtype') - random_.randint(1, 6)
        place = random_.randrange(start, len(whole)) if i % 3 else in_name
        _flip(path, place, random_.randrange(7))
        with pytest.raises(FFNScopeError, match="damaged"):
            ffnscope.load_model(str(saved))
        path.write_bytes(whole)
    ffnscope.load_model(str(saved))


def test_the_message(saved: Path) -> None:
    path = min(saved.glob("*.safetensors"))
    _flip(path, path.stat().st_size - 1)
    with pytest.raises(ModelError, match=r"safetensors is damaged: its checksum .*or make it again.*save_pretrained"):
        ffnscope.load_model(ffnscope.ModelSource(str(saved), stream="cpu"))


def test_plain_transformers_loads_it_and_what_it_saves_is_not_checked(saved: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(model), logits(ffnscope.load_model(str(saved)).model))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # trained
    model.save_pretrained(saved, max_shard_size="20KB")
    assert not any(_known(path) for path in saved.glob("*.safetensors"))
    assert torch.equal(logits(ffnscope.load_model(str(saved)).model), logits(model))


def test_edited_configs_are_loaded(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    ffnscope.load_model(str(saved))


def test_files_of_others_are_not_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "foreign")
    path = folder / "model.safetensors"
    _flip(path, path.stat().st_size - 1, bit=0)
    check_files(folder)
    ffnscope.load_model(str(folder))


def test_a_file_is_read_once_as_long_as_it_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffnscope.ffn import checksums

    check_files(saved)
    monkeypatch.setattr(checksums, "_is_intact", lambda path: pytest.fail(f"{path} was read again"))
    check_files(saved)


def test_what_is_written_block_by_block_has_checksums(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense")
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(source), stream="cpu"))
    plan = ffnscope.build_plan(ffnscope.score(loaded.model, ffnscope.find_sites(loaded.model), "weight_magnitude"), 0.5)
    write_pruned(loaded.model, loaded.tokenizer, Destination(tmp_path / "out"), plan)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and all(_known(path) for path in files)
    _flip(files[0], files[0].stat().st_size - 3)
    with pytest.raises(ModelError, match="is damaged"):
        ffnscope.load_model(str(tmp_path / "out"))
