"""Sparse weights as data: applied for a while or for good, saved and loaded, refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.apply.export import save_model
from ffnscope.apply.sparse_weights import (
    SparseWeights,
    read_sparse_weights,
    sparsified,
    sparsify_,
    write_sparse_weights,
)
from ffnscope.apply.unstructured import magnitude_weights, sparsegpt_weights, wanda_weights
from ffnscope.errors import ArtifactError, LayoutError, NonFiniteError, UsageError
from ffnscope.ffn.matrices import Matrix
from reconstructions import make, state, unchanged
from reference import text
from tiny import logits, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*of fewer than 4 tokens per")
KINDS = ["llama", "gpt2", "phi3", "mixtral", "dbrx", "gpt_oss", "listed"]


def found_in(model: Any, scope: Any = "ffn") -> SparseWeights:
    return sparsegpt_weights(model, text(16), "2:4", scope=scope)


class TestSparsified:
    @pytest.mark.parametrize("name", KINDS)
    def test_is_taken_back_to_the_bit(self, name: str) -> None:
        model = make(name)
        before, dense = state(model), logits(model)
        found = found_in(model)
        with sparsified(model, found):
            assert not torch.allclose(logits(model), dense, atol=1e-2)
            for matrix, mask in found.masks.items():
                assert torch.equal(matrix.weight(model) * mask, found.weights.get(matrix, matrix.weight(model)))
        assert unchanged(model, before)
        with pytest.raises(KeyboardInterrupt), sparsified(model, found):
            raise KeyboardInterrupt
        assert unchanged(model, before)

    @pytest.mark.parametrize("name", KINDS)
    def test_in_place_computes_the_same(self, name: str) -> None:
        model = make(name)
        found = found_in(model)
        with sparsified(model, found):
            wanted = logits(model)
        assert sparsify_(model, found) is model
        assert torch.equal(logits(model), wanted)

    def test_masks_alone_zero_what_is_there(self) -> None:
        model = tiny("llama")
        found = wanda_weights(model, text(8), 0.5, scope="linear")
        weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
        sparsify_(model, found)
        mask = found.masks[Matrix("model.layers.0.self_attn.q_proj")]
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight * mask)

    def test_contexts_nest(self) -> None:
        model = tiny("llama")
        before = state(model)
        low, high = (magnitude_weights(model, s, scope="ffn") for s in (0.3, 0.6))
        with sparsified(model, low):
            inside = logits(model)
            with sparsified(model, high):
                pass
            assert torch.equal(logits(model), inside)
        assert unchanged(model, before)


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "scope"), [("llama", "linear"), ("gpt2", "linear"), ("phi3", "ffn"), ("mixtral", "ffn")]
    )
    def test_a_stock_checkpoint_gives_equal_logits_at_the_same_size(
        self, name: str, scope: str, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        model = make(name)
        save_model(model, None, tmp_path / "dense")
        sparsify_(model, found_in(model, scope))
        save_model(model, None, tmp_path / "sparse")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
        assert torch.equal(logits(again), logits(model))
        sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("dense", "sparse")]
        assert sizes[0] == sizes[1]
        assert not list((tmp_path / "sparse").glob("*.py"))


class TestFiles:
    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_what_is_read_is_what_was_written(self, name: str, tmp_path: Path) -> None:
        model, path = make(name), tmp_path / "sparse.safetensors"
        found = found_in(model)
        write_sparse_weights(path, found)
        again = read_sparse_weights(path)
        assert (again.label, again.facts) == ("2:4", found.facts)
        assert list(again.masks) == list(found.masks)
        assert again.sparsities == found.sparsities
        assert all(torch.equal(again.masks[m], mask) for m, mask in found.masks.items())
        assert again.weights.keys() == found.weights.keys()
        assert all(torch.equal(again.weights[m], w) for m, w in found.weights.items())
        with sparsified(model, found):
            wanted = logits(model)
        with sparsified(model, again):
            assert torch.equal(logits(model), wanted)

    def test_nothing_is_overwritten_unasked(self, tmp_path: Path) -> None:
        found, path = magnitude_weights(tiny("llama"), 0.5, scope="ffn"), tmp_path / "sparse.safetensors"
        write_sparse_weights(path, found)
        with pytest.raises(ArtifactError, match="already exists"):
            write_sparse_weights(path, found)
        write_sparse_weights(path, found, overwrite=True)

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        from ffnscope.io import write_tensors

        write_tensors(tmp_path / "other", {}, {"kind": "scores"})
        with pytest.raises(ArtifactError, match="holds 'scores'; expected a file of kind 'sparse weights'"):
            read_sparse_weights(tmp_path / "other")
        write_tensors(tmp_path / "half", {}, {"kind": "sparse weights", "label": "2:4"})
        with pytest.raises(ArtifactError, match="'matrices' is missing"):
            read_sparse_weights(tmp_path / "half")


class TestRefusals:
    def test_a_model_of_other_shapes(self) -> None:
        found = magnitude_weights(tiny("llama"), 0.5, scope="ffn")
        other = tiny("llama", intermediate_size=64)
        before = state(other)
        with pytest.raises(UsageError, match=r"made for .*gate_proj of shape \(48, 32\); this model has \(64, 32\)"):
            sparsify_(other, found)
        assert unchanged(other, before)

    def test_another_model(self) -> None:
        found = magnitude_weights(tiny("llama"), 0.5, scope="ffn")
        with pytest.raises(LayoutError, match=r"model\.layers\.0\.mlp\.gate_proj is not in this model"):
            sparsify_(tiny("gpt2"), found)

    def test_values_that_cannot_be(self) -> None:
        matrix, mask = Matrix("a"), torch.tensor([[True, False]])
        with pytest.raises(UsageError, match=r"the mask of a must be bool \[out, in\]"):
            SparseWeights("2:4", {matrix: mask.int()})
        with pytest.raises(UsageError, match="a has new weights without a mask of their shape"):
            SparseWeights("2:4", {matrix: mask}, {matrix: torch.ones(2, 2)})
        with pytest.raises(UsageError, match="a has new weights that its mask removes"):
            SparseWeights("2:4", {matrix: mask}, {matrix: torch.ones(1, 2)})
        with pytest.raises(NonFiniteError, match="a holds NaN or infinity"):
            SparseWeights("2:4", {matrix: mask}, {matrix: torch.tensor([[float("inf"), 0]])})

    def test_shares(self) -> None:
        masks = {Matrix("a"): torch.tensor([[True, False]]), Matrix("b"): torch.ones(2, 3, dtype=torch.bool)}
        found = SparseWeights("unstructured", masks)
        assert (found.n_weights, found.sparsity) == (8, 1 / 8)
        assert found.sparsities == {"a": 0.5, "b": 0}
        assert replace(found, masks={}).sparsity == 0
