"""What makes a model another one: everything that changes what it computes, whoever changed it and however."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.calibrate import identity, parallel
from ffnscope.calibrate.identity import identity_of
from ffnscope.ffn.load import ModelSource
from ffnscope.sparse.relu.activation import replace_activation_, set_thresholds_
from processes import started
from reference import padded

WINDOWS = padded([16, 9, 16])

Change = Callable[[Any], None]


def _zero_data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0)  # does not count as a change of the tensor


def _unseen_row(model: Any) -> None:
    model.get_input_embeddings().weight.data[-1] += 1  # of a token that is not run


def _own_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: torch.zeros_like(x), mlp)


def _inner_code(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.act_fn.__class__ = type(type(mlp.act_fn).__name__, (type(mlp.act_fn),), {"forward": lambda self, x: x.tanh()})
    type(mlp.act_fn).__module__ = "transformers.activations"
    type(mlp.act_fn).__qualname__ = type(mlp.act_fn).__name__  # nothing but the answer tells


def _relu(model: Any) -> None:
    replace_activation_(model)


def _thresholds(model: Any) -> None:
    set_thresholds_(model, dict.fromkeys(ffnscope.find_sites(model), 0.1))


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def _buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)  # in no checkpoint


CHANGES: list[Change] = [_zero_data, _unseen_row, _own_forward, _inner_code, _relu, _hook, _buffer]

SCRIPT = """
import sys
import ffnscope
from ffnscope.evaluate.perplexity import perplexity
from test_identity import CHANGES, WINDOWS, loaded, noted, _relu, _thresholds
found, models = [], []
with ffnscope.shared_windows() as leads:
    if leads:
        sizes = noted()
        for change in (None, *CHANGES):
            models.append(loaded(sys.argv[1], change))
            found.append(perplexity(models[-1], WINDOWS).value)
        models.append(loaded(sys.argv[2], _thresholds))
        found.append(perplexity(models[-1], WINDOWS).value)
if leads:
    alone = [perplexity(model, WINDOWS).value for model in models]
    print("sizes", sizes[: len(found)], "same", [abs(a / b - 1) < 1e-9 for a, b in zip(found, alone)])
"""


def loaded(folder: str, change: Change | None, **options: Any) -> Any:
    """A model in float64, changed."""
    model = ffnscope.load_model(ModelSource(folder, device="cpu", dtype="float64", **options)).model
    if change is not None:
        change(model)
    return model


def noted() -> list[int]:
    """How many processes take part in each pass from now on."""
    from ffnscope.evaluate import perplexity as perplexities

    sizes: list[int] = []

    def note(*arguments: Any) -> Any:
        sizes.append((ranks := parallel.shared(*arguments)).size)
        return ranks

    perplexities.shared = note  # type: ignore[attr-defined]
    return sizes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("relu") / "llama", hidden_act="relu")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Values whose checksum is taken."""
    found: list[int] = []

    def count(tensors: Any) -> int:
        found.append(len(tensors))
        return before(tensors)

    before = identity.checksum_tensors
    monkeypatch.setattr(identity, "checksum_tensors", count)
    monkeypatch.setattr(identity, "_READ", {})
    yield found


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_another_model(change: Change, checkpoint: Path) -> None:
    first, second = (identity_of(loaded(str(checkpoint), None)) for _ in range(2))
    assert first.agrees(second)
    assert not first.agrees(identity_of(loaded(str(checkpoint), change)))


def test_a_threshold_makes_another_model(relu: Path) -> None:
    dense, shifted = (identity_of(loaded(str(relu), change)) for change in (None, _thresholds))
    assert not dense.agrees(shifted)


def test_looking_changes_nothing(checkpoint: Path) -> None:
    model = loaded(str(checkpoint), None).train()
    model.model.norm.weight.requires_grad_(False)
    before = [(p.requires_grad, p._version) for p in model.parameters()], [m.training for m in model.modules()]
    identity_of(model)
    after = [(p.requires_grad, p._version) for p in model.parameters()], [m.training for m in model.modules()]
    assert after == before


def test_rounding_is_no_difference(checkpoint: Path) -> None:
    one = identity_of(loaded(str(checkpoint), None))
    assert one.agrees(identity.Identity(one.exact, one.logits * (1 + 4e-16), one.precision))
    assert not one.agrees(identity.Identity(one.exact, one.logits * (1 + 1e-12), one.precision))


def test_values_in_files_are_read_again_only_when_the_file_changes(tmp_path: Path, reads: list[int]) -> None:
    folder = make_checkpoint(tmp_path / "llama")
    model = loaded(str(folder), None, stream="cpu")
    first = identity_of(model)
    n, of_buffers = len(reads), sum(1 for _ in model.named_buffers())
    assert identity_of(model).agrees(first)
    assert len(reads) == n + of_buffers
    file = folder / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(0, 0))
    assert not identity_of(model).agrees(first)


def test_another_file_of_the_same_size_and_time_is_read(tmp_path: Path, reads: list[int]) -> None:
    """As `rsync --times` or an unpacked archive puts it there: all that differs is that it is another file."""
    folder = make_checkpoint(tmp_path / "llama")
    model = loaded(str(folder), None, stream="cpu")
    first = identity_of(model)
    file = folder / "model.safetensors"
    other, times = bytearray(file.read_bytes()), file.stat()
    other[-1] ^= 1
    (tmp_path / "other").write_bytes(other)
    os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "other").replace(file)
    assert identity_of(model).exact != first.exact


def test_a_changed_model_is_run_alone(checkpoint: Path, relu: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    ended = started(2, [str(script), str(checkpoint), str(relu)], tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    n = len(CHANGES) + 1
    assert f"sizes {[2, *[1] * n]} same {[True] * (n + 1)}" in ended[0][1]
