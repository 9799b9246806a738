"""The model card of a pruned checkpoint: what was removed, by which rule, on which text, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ffnscope.apply.padding import zeroed_channels
from ffnscope.apply.profile import error_profile, judged_on, raised_dampings, reconstruction_name
from ffnscope.types import EvalResult, PruningPlan


def model_card(
    model: nn.Module,
    name: str,
    loading: str,
    plan: PruningPlan | None,
    results: Mapping[str, Sequence[EvalResult]],
    zeroed: int | None = None,
) -> str:
    """Markdown text of the card; ``loading`` is the part that tells how to load the model.

    ``zeroed`` is what `zeroed_channels` gives, for a model that cannot be run.
    """
    parts = [_front(plan), f"# {name}\n", loading]
    if plan is not None:
        zeroed = zeroed_channels(model, plan) if zeroed is None else zeroed
        parts += [_plan(model, plan, zeroed), _widths(plan)]
        told = plan.provenance.get("reconstruction")
        parts += [_reconstruction(plan, told)] if told else []
        trained = plan.provenance.get("trained")
        parts += [_trained(trained)] if trained else []
    if results:
        parts.append(_results(results))
    return "\n".join(parts)


def _front(plan: PruningPlan | None) -> str:
    base = _base(plan)
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, ffnscope]"]
    if base is not None and base.count("/") == 1:
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---\n"])


def loading_code(name: str, *, remote: bool) -> str:
    """Tell how to load a checkpoint; ``remote``: with the modeling file beside the weights."""
    if not remote:
        return f'    AutoModelForCausalLM.from_pretrained("{name}")\n'
    return (
        "The FFNs have widths that the config of this family cannot express. `modeling_ffnscope.py` beside the weights "
        "builds them; never load with `ignore_mismatched_sizes=True`, which would draw them at random.\n\n"
        f'    ffnscope.load_model("{name}")\n'
        f'    AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
    )


def _plan(model: nn.Module, plan: PruningPlan, zeroed: int) -> str:
    rows: dict[str, Any] = {
        "made from": _base(plan),
        "weights hash": plan.provenance.get("model"),
        "parameters now": f"{sum(p.numel() for p in model.parameters()):,}",
        "metric": plan.metric,
        "allocator": plan.allocator,
        "sparsity asked": f"{plan.budget.sparsity:g}",
        "sparsity": f"{plan.sparsity:.4f} of the FFN channels",
        "widths are multiples of": plan.budget.multiple_of if plan.budget.multiple_of > 1 else None,
        "protected channels": sum(index.numel() for index in plan.protected.values()) or None,
    }
    if zeroed:
        rows["of these still in the files"] = f"{zeroed:,} channels, as zeros, so that the widths fit together"
    text: Mapping[str, Any] = plan.provenance.get("calibration") or {}
    for key in ("text", "windows", "length", "tokens", "hash"):
        rows[f"calibration {key}"] = text.get(key)
    return "## Plan\n\n" + _table(("what", "value"), [(k, v) for k, v in rows.items() if v is not None])


def _reconstruction(plan: PruningPlan, facts: Mapping[str, Any]) -> str:
    """What was refitted, on how much text, and what it left of the error of the FFNs' outputs."""
    rows: list[tuple[Any, ...]] = [("kind", reconstruction_name(facts))]
    rows += [(key, facts[key]) for key in ("target", "damping", "text", "tokens") if key in facts]
    rows += [(f"distillation: {key}", value) for key, value in facts.get("distillation", {}).items()]
    errors = error_profile(plan, facts)
    if errors:
        means = (sum(row[key] for row in errors) / len(errors) for key in ("error_without", "error"))
        before, after = (f"{mean:.4g}" for mean in means)
        left = f"{before} of its power without the refit, {after} with it"
        rows.append((f"mean squared error of an FFN's output, on {judged_on(errors)}", left))
    raised = raised_dampings(facts)
    rows += [("damping raised, since the factorisation failed", raised)] if raised else []
    return f"## Reconstruction\n\n{_told(facts)}\n\n" + _table(("what", "value"), rows)


def _trained(facts: Mapping[str, Any]) -> str:
    """How the pruned model was fine-tuned afterwards."""
    rows = [(key, f"{value:,}" if isinstance(value, int) else value) for key, value in facts.items()]
    text = "The pruned model was trained after all that. Compare it with trained models only."
    return f"## Trained\n\n{text}\n\n" + _table(("what", "value"), rows)


def _told(facts: Mapping[str, Any]) -> str:
    text = "The down columns of the channels that stay, or a bias, make up for those that are gone."
    if not facts.get("trained"):
        why = ": no epoch of the distillation lowered the held-out error" if "distillation" in facts else ""
        return f"{text} Nothing was trained for that{why}."
    sites: Mapping[str, Any] = facts.get("sites", {})
    n_trained = sum(bool(one.get("trained")) for one in sites.values())
    where = f"in {n_trained} of {len(sites)} FFNs " if sites else ""
    tokens = f"{facts['tokens']:,} tokens of " if "tokens" in facts else ""
    return (
        f"{text} **Trained**: {where}gate, up and down of these channels were trained, FFN by FFN and without labels, "
        f"towards the target of the refit on {tokens}the calibration text. This is no training-free result."
    )


def _widths(plan: PruningPlan) -> str:
    rows = [(site.name, site.d_ff, width) for site, width in plan.widths.items()]
    if len({row[1:] for row in rows}) == 1:
        return f"Every one of the {len(rows)} FFNs keeps {rows[0][2]} of {rows[0][1]} channels.\n"
    return "## Widths\n\n" + _table(("FFN", "channels before", "channels"), rows)


def _results(results: Mapping[str, Sequence[EvalResult]]) -> str:
    every = [(label, one) for label, measured in results.items() for one in measured]
    rows = [(label, one.name, _value(one), one.n, one.dataset) for label, one in every]
    notes = "".join(f"\nMeasured as: {protocol}\n" for protocol in dict.fromkeys(one.protocol for _, one in every))
    return "## Measured\n\n" + _table(("model", "what", "value ± standard error", "tokens", "text"), rows) + notes


def _value(one: EvalResult) -> str:
    unit = "" if one.unit == "1" else f" {one.unit}"
    return f"{one.value:.6g}" + ("" if one.stderr is None else f" ± {one.stderr:.2g}") + unit


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _base(plan: PruningPlan | None) -> str | None:
    """Model that a plan was made from; of a local one only the name, not where it lies."""
    name = None if plan is None else plan.provenance.get("model_id")
    if not isinstance(name, str):
        return None
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name
