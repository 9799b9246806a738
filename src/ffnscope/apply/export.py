"""Prune for good, and save as a checkpoint of safetensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from ffnscope.apply.card import loading_code, model_card
from ffnscope.apply.folder import replacing_folder
from ffnscope.apply.mask import check_plan
from ffnscope.apply.padding import field_widths, pad_, widest_widths
from ffnscope.apply.selfcheck import check_cut
from ffnscope.apply.slice import slice_
from ffnscope.apply.widths import fit_config, narrowing, stock_class
from ffnscope.errors import NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.checksums import add_checksum
from ffnscope.ffn.load import quiet_transformers
from ffnscope.ffn.narrowed import AUTO, MODELING, NARROWED
from ffnscope.ffn.offload import saving
from ffnscope.ffn.sites import find_sites
from ffnscope.io import write_plan
from ffnscope.scoring import not_finite_weight
from ffnscope.types import EvalResult, PruningPlan

PLAN = "ffnscope_plan.json"
WIDTHS = "ffnscope_ffn_widths"
SHARD = "5GB"
SHARD_SIZE = r"^\d+(\.\d+)?[KMGT]B$"


def prune_(model: nn.Module, plan: PruningPlan, *, pad_to_widest: bool = False) -> nn.Module:
    """Apply a plan for good, in place, and return the model.

    With ``pad_to_widest``, FFNs that had one width before have one width after it (sites that the plan leaves out
    count): every site is sliced to the widest kept width and the surplus channels are zeroed. This computes the same,
    loads wherever the dense model does, and saves only down to the widest site. Without it, only rounding is evened out
    in this way, where one config field sets the widths of several kinds of FFN (see `field_widths`), with a
    `UserWarning`. Before anything is changed, cutting is compared with masking on this very model (see `check_cut`).

    Raises:
        UsageError: the plan was made for a model of other shapes; the model is then unchanged.
        ModelError: a weight has no value; the model is then unchanged.
        NonFiniteError: a weight holds NaN or infinity; the model is then unchanged.
        LayoutError: cutting would compute something else than masking; the model is then unchanged.
    """
    check_prunable(model, plan)
    return cut_(model, plan, pad_to_widest=pad_to_widest)


def cut_(model: nn.Module, plan: PruningPlan, *, pad_to_widest: bool) -> nn.Module:
    """What `prune_` does after its checks."""
    if pad_to_widest:
        plan = pad_(model, plan, widest_widths(model, plan))
    return slice_(model, pad_(model, plan, field_widths(model, plan, any_surplus=pad_to_widest)))


def check_prunable(model: nn.Module, plan: PruningPlan) -> None:
    """Raise what `prune_` raises; the model is not changed."""
    check_plan(model, plan)
    name = not_finite_weight(model)
    if name is not None:
        raise NonFiniteError(
            f"the weight {name} holds NaN or infinity, so the pruned model would be broken too. Load the model "
            "again from an intact checkpoint."
        )
    check_cut(model, list(plan.kept))


def save_model(
    model: nn.Module,
    tokenizer: Any,
    path: Path,
    *,
    plan: PruningPlan | None = None,
    results: Mapping[str, Sequence[EvalResult]] | None = None,
    max_shard_size: str = SHARD,
    overwrite: bool = False,
) -> None:
    """Save model, tokenizer, generation config, plan and a model card; loading gives the same logits.

    Widths that the config can express load by plain ``AutoModelForCausalLM.from_pretrained(path)``. For all others
    (FFNs of different widths, or a family without a field for the width) the config lists what differs and
    ``modeling_ffnscope.py`` lies beside the weights: `load_model` loads them as they are, plain `transformers` with
    ``trust_remote_code=True``, and without it raises, because shapes differ. A cut norm inside an FFN (BitNet) has an
    epsilon of its own, which a stock config cannot hold: there logits differ by about 1e-5 after loading.

    Args:
        model: a `transformers` causal LM.
        tokenizer: saved too, with its chat template; may be None.
        path: folder; written under a temporary name and renamed, so a failure leaves nothing behind.
        plan: saved beside the model and told in its card.
        results: label ("dense", "pruned") -> measurements, told in the card.
        max_shard_size: largest safetensors file, such as "5GB".
        overwrite: replace what is there.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
        UsageError: not a size of shards.
        ModelError: a checkpoint could not be loaded, because the config does not build this model's parameters.
        NotAvailableError: different widths in a model whose code is not part of `transformers`.
    """
    check_shard_size(max_shard_size)
    changes = config_changes(model)
    with replacing_folder(path, overwrite) as part, quiet_transformers():
        write_checkpoint(part, model, tokenizer, plan, max_shard_size)
        if changes:
            add_modeling(part, model, changes, {site.name: site.d_ff for site in find_sites(model)})
        loading = loading_code(path.name, remote=bool(changes))
        write_card(part, model_card(model, path.name, loading, plan, results or {}))


def config_changes(model: nn.Module) -> dict[str, Any]:
    """Fit the config to a pruned model and return what it cannot say (see `narrowing`), {} where that is nothing.

    Raises:
        ModelError: the config does not build this model's parameters.
        NotAvailableError: something is left to say of a model whose code is not part of `transformers`.
    """
    changes = {} if fit_config(model) else narrowing(model)
    if changes and not stock_class(model).__module__.startswith("transformers."):
        raise NotAvailableError(
            f"{type(model).__name__} comes with code of its own, whose config cannot express these widths. Pad to the "
            "widest (--pad-to-widest), or use the allocator 'local'."
        )
    return changes


def check_shard_size(size: str) -> None:
    """Raise UsageError unless ``size`` is a number of bytes with a unit."""
    if not re.fullmatch(SHARD_SIZE, size):
        raise UsageError(f"max_shard_size must be a number with KB, MB, GB or TB, such as 5GB; got {size!r}.")


def write_checkpoint(
    folder: Path, model: nn.Module, tokenizer: Any, plan: PruningPlan | None, max_shard_size: str
) -> None:
    """Write weights, configs, tokenizer and plan into a new folder, without what an earlier pruning left."""
    with saving(model) as arguments:
        cast(Any, model).save_pretrained(folder, max_shard_size=max_shard_size, **arguments)
    complete_checkpoint(folder, tokenizer, plan)


def complete_checkpoint(folder: Path, tokenizer: Any, plan: PruningPlan | None) -> None:
    """Add checksums, tokenizer and plan to a new folder with weights and configs; remove what earlier pruning left."""
    for path in sorted(folder.glob("*.safetensors")):
        add_checksum(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if plan is not None:
        write_plan(folder / PLAN, plan)
    (folder / MODELING.name).unlink(missing_ok=True)
    config = read_config(folder)
    classes = {k: v for k, v in (config.pop("auto_map", None) or {}).items() if f"{MODELING.stem}." not in str(v)}
    kept = {k: v for k, v in config.items() if k not in (NARROWED, WIDTHS)}
    write_config(folder, {**kept, "auto_map": classes} if classes else kept)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a folder in the making."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` of a folder in the making."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, text: str) -> None:
    """Write the model card of a folder in the making."""
    (folder / "README.md").write_text(text, encoding="utf-8")


def add_modeling(folder: Path, model: nn.Module, changes: dict[str, Any], widths: Mapping[str, int]) -> None:
    """Lay our modeling file beside the weights, and write into ``config.json`` what it needs."""
    shutil.copyfile(MODELING, folder / MODELING.name)
    config = read_config(folder)
    config["auto_map"] = {**config.get("auto_map", {}), AUTO: f"{MODELING.stem}.{stock_class(model).__name__}"}
    config[WIDTHS] = dict(widths)
    write_config(folder, {**config, NARROWED: changes})
