"""Which shapes a config builds: fit its width fields to a pruned model, or tell what no field can express."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ffnscope.errors import ModelError
from ffnscope.ffn.load import quiet_transformers

Shape = tuple[int, ...]
Change = dict[str, Any]
"""Path of a config field (``text_config.intermediate_size``) -> its new value."""

# lfm2 derives its width from the field (2/3 of it, rounded up) unless this switch is off
DERIVED = {"block_auto_adjust_ff_dim": "intermediate_size"}
# xlstm rounds the product of a factor and the residual width up to a multiple: field of the multiple -> (factor, width)
ROUNDED = {"ffn_round_up_to_multiple_of": ("ffn_proj_factor", "hidden_size")}


def fit_config(model: nn.Module) -> bool:
    """Write the widths of a pruned model into its config and tell whether the config now builds its shapes.

    Which fields hold a width is found by trial: a field whose value explains a shape is changed in a copy of the
    config, the class is built from it on the meta device, and the change stays when strictly fewer shapes differ.
    The model's own config changes only when none is left.
    """
    config: Any = copy.deepcopy(model.config)
    wrong = _built_otherwise(model, config)
    changes: list[Change] = []
    while wrong:
        for change in _candidates(config, wrong):
            trial = changed_config(config, change)
            left = None if trial is None else _built_otherwise(model, trial)
            if left is not None and left.keys() < wrong.keys():
                config, wrong = trial, left
                changes.append(change)
                break
        else:
            return False
    for change in changes:
        set_fields(model.config, change)
    return wrong is not None


def narrowing(model: nn.Module) -> dict[str, Any]:
    """What differs from the stock class built from the model's config.

    Returns:
        parameter name -> shape, and attribute name (``model.layers.0.mlp.down_proj.in_features``) -> number, for the
        modules that own such a parameter and their parents. Empty when the config says it all.

    Raises:
        ModelError: the class cannot be built from the config, or has parameters that the model has not.
    """
    built = stock_model(model, model.config)
    if built is None:
        raise ModelError(
            f"{type(model).__name__} cannot be built from its config, so a checkpoint could not be loaded."
        )
    found, expected = shapes_of(model), shapes_of(built)
    if found.keys() != expected.keys():
        name = sorted(found.keys() ^ expected.keys())[0]
        raise ModelError(
            f"{type(model).__name__} has other parameters than its config builds ({name}); a checkpoint could not be "
            "loaded."
        )
    changes: dict[str, Any] = {name: list(shape) for name, shape in found.items() if shape != expected[name]}
    owners = [name.rpartition(".")[0] for name in changes]
    for path in dict.fromkeys([*owners, *(owner.rpartition(".")[0] for owner in owners)]):
        there, here = _numbers(built.get_submodule(path)), _numbers(model.get_submodule(path))
        changes |= {f"{path}.{k}".removeprefix("."): v for k, v in here.items() if k in there and there[k] != v}
    return changes


def stock_class(model: nn.Module) -> type[nn.Module]:
    """Class of `transformers` that a model is of, also when it was loaded from a checkpoint of unequal widths."""
    return getattr(type(model), "stock_class", type(model))


def stock_model(model: nn.Module, config: Any) -> nn.Module | None:
    """Build the stock class on the meta device, or None when this config does not allow it."""
    from huggingface_hub.errors import StrictDataclassError

    maker: Any = stock_class(model)
    impossible = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError)
    try:
        with quiet_transformers(), torch.device("meta"):
            return maker(copy.deepcopy(config))
    except (*impossible, StrictDataclassError):
        return None


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Shapes of all parameters and buffers."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _built_otherwise(model: nn.Module, config: Any) -> dict[str, tuple[Shape, Shape]] | None:
    """Parameters whose shapes differ: name -> (as built from the config, as the model has it)."""
    built = stock_model(model, config)
    if built is None:
        return None
    found, expected = shapes_of(model), shapes_of(built)
    if found.keys() != expected.keys():
        return None
    return {name: (expected[name], shape) for name, shape in found.items() if shape != expected[name]}


def _numbers(module: nn.Module) -> dict[str, int | float]:
    plain = vars(module).items()
    return {name: v for name, v in plain if isinstance(v, int | float) and not isinstance(v, bool)}


def _candidates(config: Any, wrong: Mapping[str, tuple[Shape, Shape]]) -> Iterator[Change]:
    """Changes that might give the wanted widths, likeliest first: exact, other multiples, unset, switched, listed."""
    fields = list(width_fields(config))
    numbers = {path: value for path, value in fields if type(value) is int and value > 0}
    sizes = _sizes(wrong)
    for (path, value), (old, new) in itertools.product(numbers.items(), sizes):
        if value == old:
            yield {path: new}
    for (path, value), (old, new) in itertools.product(numbers.items(), sizes):
        if value != old and (old % value == 0 or value % old == 0) and (value * new) % old == 0:
            yield {path: value * new // old}
    for (path, value), (_, new) in itertools.product(fields, sizes):
        parent, _, name = path.rpartition(".")
        if value is None:
            yield {path: new}
        elif value is True and name in DERIVED:
            yield {path: False, f"{parent}.{DERIVED[name]}".removeprefix("."): new}
        elif name in ROUNDED:
            factor, width = (f"{parent}.{n}".removeprefix(".") for n in ROUNDED[name])
            yield {path: 1, factor: new / numbers[width]}
    for path, value in fields:
        if isinstance(value, list):
            yield {path: _per_layer(value, wrong)}


def _sizes(wrong: Mapping[str, tuple[Shape, Shape]]) -> list[tuple[int, int]]:
    """Pairs (built, found) of sizes that differ; none when layers differ from each other, which no number expresses."""
    wanted: dict[tuple[str, int], set[int]] = {}
    for name, (built, found) in wrong.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        for old, new in zip(built, found, strict=False):
            if old != new:
                wanted.setdefault((pattern, old), set()).add(new)
    if any(len(news) > 1 for news in wanted.values()):
        return []
    return list(dict.fromkeys((old, min(news)) for (_, old), news in wanted.items()))


def width_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a config and its sub-configs that may hold a width: numbers, lists of numbers, switches, unset ones."""
    from transformers import PreTrainedConfig

    shared = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from width_fields(value, f"{prefix}{name}.")
        elif name.startswith("_") or name in shared or name.endswith("_token_id"):
            continue
        elif value is None or isinstance(value, int) or (isinstance(value, list) and _all_int(value)):
            yield prefix + name, value


def _all_int(values: list[Any]) -> bool:
    return bool(values) and all(type(v) is int for v in values)


def _per_layer(values: list[int], wrong: Mapping[str, tuple[Shape, Shape]]) -> list[int]:
    """Replace the width of every layer whose parameters differ."""
    new = list(values)
    for name, (built, found) in wrong.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), len(values))
        for old, size in zip(built, found, strict=False):
            if layer < len(values) and old == values[layer]:
                new[layer] = size
    return new


def changed_config(config: Any, change: Change) -> Any:
    """Copy of a config with changed fields, or None when the config refuses a value."""
    from huggingface_hub.errors import StrictDataclassError

    trial = copy.deepcopy(config)
    try:
        set_fields(trial, change)
    except (ValueError, TypeError, AttributeError, StrictDataclassError):
        return None
    return trial


def set_fields(config: Any, change: Change) -> None:
    """Write the values of a change into a config."""
    for path, value in change.items():
        *parents, name = path.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, name, value)
