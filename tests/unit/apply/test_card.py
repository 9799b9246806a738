from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffnscope.apply.export import prune_, save_model
from ffnscope.types import EvalResult, PruningPlan

MakePlan = Callable[..., PruningPlan]
TEXT = {"text": "sotu: split train", "windows": 4, "length": 32, "tokens": 128, "hash": "0123456789abcdef"}


def card(model: Any, plan: PruningPlan | None, folder: Path, results: dict[str, list[EvalResult]] | None = None) -> str:
    save_model(model if plan is None else prune_(model, plan), None, folder, plan=plan, results=results)
    return (folder / "README.md").read_text()


def with_facts(plan: PruningPlan, model_id: str = "org/base") -> PruningPlan:
    return replace(plan, provenance={"model_id": model_id, "model": "fedcba9876543210", "calibration": TEXT})


def test_what_is_known_is_told(llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
    results = {
        "dense": [EvalResult("perplexity", 12.3456789, "1", 0.25, 124, "sotu | test", "blocks of 32")],
        "pruned": [
            EvalResult("perplexity", 45.0, "1", None, 124, "sotu | test", "blocks of 32"),
            EvalResult("kl_to_dense", 0.5, "nats/token", 0.125, 124, "sotu | test", "blocks of 32"),
        ],
    }
    text = card(llama, with_facts(random_plan(llama)), tmp_path / "small", results)
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert 'base_model: "org/base"\n---\n\n# small\n' in text
    assert 'AutoModelForCausalLM.from_pretrained("small")\n' in text
    for row in (
        "| made from | org/base |",
        "| weights hash | fedcba9876543210 |",
        f"| parameters now | {sum(p.numel() for p in llama.parameters()):,} |",
        "| metric | random |",
        "| allocator | local |",
        "| sparsity asked | 0.25 |",
        "| sparsity | 0.2500 of the FFN channels |",
        "| calibration text | sotu: split train |",
        "| calibration hash | 0123456789abcdef |",
        "| dense | perplexity | 12.3457 ± 0.25 | 124 | sotu \\| test |",
        "| pruned | perplexity | 45 | 124 | sotu \\| test |",
        "| pruned | kl_to_dense | 0.5 ± 0.12 nats/token | 124 | sotu \\| test |",
    ):
        assert f"{row}\n" in text
    assert "Every one of the 2 FFNs keeps 36 of 48 channels." in text
    assert text.count("Measured as: blocks of 32") == 1
    assert "as zeros" not in text
    assert "multiples" not in text and "protected" not in text and "trust_remote_code" not in text


def test_different_widths_are_listed(llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
    plan = random_plan(llama, 0.51, allocator="global")
    text = card(llama, plan, tmp_path / "small")
    for site, width in plan.widths.items():
        assert f"| {site.name} | 48 | {width} |\n" in text
    assert 'from_pretrained("small", trust_remote_code=True)' in text
    assert "never load with `ignore_mismatched_sizes=True`" in text
    assert "made from" not in text and "## Measured" not in text and "base_model" not in text


def test_a_local_folder_is_no_base_model(llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
    plan = with_facts(random_plan(llama), str(tmp_path / "dense"))
    text = card(llama, plan, tmp_path / "small")
    assert "base_model" not in text and "| made from | dense |" in text


def test_without_a_plan(llama: Any, tmp_path: Path) -> None:
    assert "## Plan" not in card(llama, None, tmp_path / "same")
