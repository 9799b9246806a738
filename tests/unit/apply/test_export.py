from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from faults import small_files
from ffnscope.apply.export import PLAN, prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.errors import ArtifactError, NonFiniteError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_plan
from ffnscope.types import PruningPlan
from tiny import logits, tiny

MakePlan = Callable[..., PruningPlan]


def widths(model: Any) -> list[int]:
    return [s.d_ff for s in find_sites(model)]


class TestPrune:
    def test_equal_widths_are_sliced(self, llama: Any, random_plan: MakePlan) -> None:
        assert prune_(llama, random_plan(llama)) is llama
        assert widths(llama) == [36, 36]

    def test_equal_widths_are_not_padded(self, llama: Any, random_plan: MakePlan) -> None:
        assert widths(prune_(llama, random_plan(llama), pad_to_widest=True)) == [36, 36]

    def test_different_widths_are_sliced(self, llama: Any, random_plan: MakePlan) -> None:
        plan = random_plan(llama, 0.51, allocator="global")
        assert widths(prune_(llama, plan)) == list(plan.widths.values())

    def test_a_plan_for_some_layers(self, llama: Any, random_plan: MakePlan) -> None:
        whole = random_plan(llama)
        site = next(iter(whole.kept))
        plan = replace(whole, kept={site: whole.kept[site]})
        with masked(llama, plan):
            expected = logits(llama)
        prune_(llama, plan, pad_to_widest=True)
        assert widths(llama) == [48, 48]
        torch.testing.assert_close(logits(llama), expected)
        site = next(iter(random_plan(llama).kept))
        prune_(llama, replace(whole, kept={site: whole.kept[site]}))
        assert widths(llama) == [36, 48]

    def test_padding_zeroes_what_it_cannot_remove(self, llama: Any, random_plan: MakePlan) -> None:
        plan = random_plan(llama, 0.51, allocator="global")
        narrow, wide = sorted(plan.widths.values())
        prune_(llama, plan, pad_to_widest=True)
        assert widths(llama) == [wide, wide]
        (layer,) = [layer for layer in llama.model.layers if not layer.mlp.up_proj.weight.any(1).all()]
        dead = ~layer.mlp.up_proj.weight.any(1)
        assert int(dead.sum()) == wide - narrow
        assert torch.equal(dead, ~layer.mlp.down_proj.weight.any(0))
        assert torch.equal(dead, ~layer.mlp.gate_proj.weight.any(1))

    def test_another_model(self, random_plan: MakePlan) -> None:
        with pytest.raises(UsageError, match="Use the model that was scored"):
            prune_(tiny("llama", intermediate_size=64), random_plan(tiny("llama")))


class TestSave:
    def test_model_tokenizer_and_plan(self, llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        plan = random_plan(llama)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 5}, unk_token="a")))
        path = tmp_path / "new" / "out"
        save_model(prune_(llama, plan), tokenizer, path, plan=plan)
        again = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(logits(again), logits(llama))
        assert AutoTokenizer.from_pretrained(path).encode("a") == [5]
        back = read_plan(path / PLAN)
        assert all(torch.equal(back.kept[s], k) for s, k in plan.kept.items())
        assert list(path.parent.iterdir()) == [path]
        plain = tmp_path / "plain"
        plain.mkdir()
        assert path.stat().st_mode == plain.stat().st_mode

    def test_in_bfloat16(self, random_plan: MakePlan, tmp_path: Path) -> None:
        model = tiny("llama", dtype=torch.bfloat16)
        save_model(prune_(model, random_plan(model)), None, tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))

    def test_what_exists_is_kept_unless_asked(self, llama: Any, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.mkdir()
        (path / "old").touch()
        with pytest.raises(ArtifactError, match=r"out already exists. Choose another output, or pass --overwrite"):
            save_model(llama, None, path)
        assert [p.name for p in path.iterdir()] == ["old"]
        save_model(llama, None, path, overwrite=True)
        assert (path / "config.json").exists() and not (path / "old").exists()
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_in_its_place(self, llama: Any, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.touch()
        save_model(llama, None, path, overwrite=True)
        assert (path / "config.json").exists()
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("limit", [100, 10_000])
    def test_a_full_disk_leaves_what_was_there(self, llama: Any, tmp_path: Path, exists: bool, limit: int) -> None:
        path = tmp_path / "out"
        if exists:
            path.mkdir()
            (path / "old").touch()
        with small_files(limit), pytest.raises(ArtifactError, match=r"cannot write .*out: .*[Ff]ile too large"):
            save_model(llama, None, path, overwrite=True)
        assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == (
            ["out", "out/old"] if exists else []
        )

    def test_an_interrupt_while_swapping_puts_the_old_folder_back(
        self, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, replace_, calls = tmp_path / "out", Path.replace, []
        path.mkdir()
        (path / "old").touch()

        def interrupted(self: Path, target: Path) -> Path:
            calls.append(target)
            if calls.count(path) == 1 and target == path:
                raise KeyboardInterrupt
            return replace_(self, target)

        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_model(llama, None, path, overwrite=True)
        assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/old"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, llama: Any, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(ArtifactError, match=r"cannot write .*out: Permission denied"):
            save_model(llama, None, tmp_path / "out")


def test_weights_that_are_not_finite_are_not_pruned(llama: Any, random_plan: Callable[..., PruningPlan]) -> None:
    plan = random_plan(llama)
    weight = llama.model.layers[1].input_layernorm.weight
    weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.input_layernorm\.weight holds NaN or infinity"):
        prune_(llama, plan)
    assert [site.d_ff for site in find_sites(llama)] == [site.d_ff for site in plan.kept]
