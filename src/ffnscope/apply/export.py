"""Save a pruned model as a checkpoint that plain `transformers` loads."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ffnscope.apply.mask import check_plan
from ffnscope.apply.slice import slice_
from ffnscope.errors import ArtifactError, NotAvailableError, UsageError
from ffnscope.ffn.load import quiet_transformers
from ffnscope.ffn.offload import materialised, saving
from ffnscope.ffn.projection import coupled
from ffnscope.ffn.sites import find_sites
from ffnscope.io import write_plan, writing
from ffnscope.types import FFNSite, PruningPlan

CARD = "ffnscope_plan.json"


def prune_(model: nn.Module, plan: PruningPlan, *, pad_to_widest: bool = False) -> nn.Module:
    """Apply a plan for good, in a form that can be saved.

    Equal widths are sliced. Unequal widths raise (sites that the plan leaves out count), unless ``pad_to_widest``:
    then every site is sliced to the widest kept width and the surplus channels are zeroed, which computes the same
    and loads everywhere.

    Raises:
        NotAvailableError: unequal widths without ``pad_to_widest``; the model is then unchanged.
        UsageError: the plan was made for a model of other shapes; the model is then unchanged.
    """
    check_plan(model, plan)
    planned = {site.name for site in plan.kept}
    widths = {s.d_ff for s in find_sites(model) if s.name not in planned} | set(plan.widths.values())
    if len(widths) > 1 and not pad_to_widest:
        raise NotAvailableError(
            f"the plan keeps unequal widths ({min(widths)} to {max(widths)} channels); such a checkpoint "
            "is not available in this version. Use allocator 'local', or pad to the widest (--pad-to-widest), which "
            "loads everywhere but saves only down to the widest site."
        )
    return slice_(model, _padded(model, plan, max(widths)) if len(widths) > 1 else plan)


def save_model(
    model: nn.Module, tokenizer: Any, path: Path, *, plan: PruningPlan | None = None, overwrite: bool = False
) -> None:
    """Save model and tokenizer so that ``AutoModelForCausalLM.from_pretrained(path)`` gives the same logits.

    Written to a temporary folder and renamed, so a failure leaves nothing behind. Before anything is written, the
    shapes are checked against a model built from the config.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
        UsageError: the config cannot express the shapes, so that the checkpoint would not load.
    """
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} already exists. Choose another output, or pass --overwrite to replace it.")
    check_reloadable(model)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path), quiet_transformers(), saving(model) as arguments:
            part.mkdir(parents=True)
            cast(Any, model).save_pretrained(part, **arguments)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            if plan is not None:
                write_plan(part / CARD, plan)
            _swap(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_reloadable(model: nn.Module) -> None:
    """Raise UsageError unless a model built from the config has exactly the shapes of this one.

    The check builds on the meta device, so it costs no memory.
    """
    with quiet_transformers(), torch.device("meta"):
        maker: Any = type(model)
        expected: Mapping[str, torch.Tensor] = maker(model.config).state_dict()
    for name, value in model.state_dict().items():
        if name in expected and expected[name].shape != value.shape:
            raise UsageError(
                f"the checkpoint would not load: {name} has shape {tuple(value.shape)}, but its config builds "
                f"{tuple(expected[name].shape)}. Prune all layers to one width, or pad to the widest."
            )


def _swap(part: Path, path: Path) -> None:
    """Rename ``part`` to ``path``; what was there is moved aside first, put back on failure, and removed last."""
    if not path.exists():
        part.replace(path)
        return
    old = part.with_suffix(".old")
    path.replace(old)
    try:
        part.replace(path)
    except BaseException:
        old.replace(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def _padded(model: nn.Module, plan: PruningPlan, width: int) -> PruningPlan:
    """Zero the removed channels and return a plan that keeps ``width`` per site, the zeroed ones filling up."""
    kept: dict[FFNSite, torch.Tensor] = {}
    for site, index in plan.kept.items():
        removed = plan.removed(site)
        with torch.no_grad(), materialised(model, site, write=True):
            for entry in coupled(model, site, removed):
                entry.parameter.index_fill_(entry.axis, entry.index.to(entry.parameter.device), 0)
        kept[site] = torch.cat([index, removed[: width - index.numel()]]).sort().values
    return PruningPlan(kept, plan.metric, plan.allocator, plan.budget, plan.protected, plan.provenance)
