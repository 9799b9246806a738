"""Value types of the YAML: strict scalars (no "4" for 4, no true for 1) and names checked against the registries."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic.types import Strict
from pydantic_core import PydanticCustomError

from ffnscope.errors import UsageError
from ffnscope.ffn.load import MEMORY
from ffnscope.registry import ALLOCATORS, METRICS, import_own

NAMES_OF = "x-names-of"


class Block(BaseModel):
    """One mapping of the YAML: unknown keys are refused, values cannot be changed, an empty block is all defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_block(cls, value: Any) -> Any:
        return {} if value is None else value


def did_you_mean(asked: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `` Did you mean 'x'?`` (with a leading blank) or an empty string."""
    near = difflib.get_close_matches(asked, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def refuse(message: str) -> PydanticCustomError:
    """Build a value error whose message reaches the user as it is."""
    return PydanticCustomError("ffnscope", "{message}", {"message": message})


def _metric_name(name: str) -> str:
    known = METRICS.names()
    if name in known:
        return name
    hint = did_you_mean(name, known)
    raise refuse(f"unknown metric {name!r}.{hint} Known: {', '.join(sorted(known))}")


def _own_module(name: str) -> str:
    try:
        import_own(name)
    except UsageError as error:
        raise refuse(str(error).rstrip(".")) from error
    return name


def _allocator_name(name: str) -> str:
    known = ALLOCATORS.names()
    if name not in known:
        raise refuse(f"unknown allocator {name!r}.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}")
    return name


_DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"


def _device(name: str) -> str:
    if not re.fullmatch(_DEVICE, name):
        hint = did_you_mean(name, ("auto", "cpu", "cuda", "mps"))
        raise refuse(f"unknown device {name!r}.{hint} Known: auto, cpu, cuda, cuda:N, mps")
    return name


def _not_blank(text: str) -> str:
    if not text.strip():
        raise refuse("must not be empty")
    return text


def _folder_name(name: str) -> str:
    if name in {".", ".."} or re.search(r"[/\\]", name) or not name.isprintable():
        raise refuse(f"is used as a folder name, so it must hold no '/' or '\\' and not be '.' or '..'; got {name!r}")
    return name


def _percent_hint(value: float) -> str:
    return f" Did you mean {value / 100:g} ({value:g} %)?" if 1 < value < 100 else ""


def _sparsity(value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise refuse(
            f"sparsity must be in [0, 1), the fraction of channels to remove; got {value:g}.{_percent_hint(value)}"
        )
    return value


def _fraction(value: float) -> float:
    if not 0.0 < value < 1.0:
        raise refuse(f"must be in (0, 1), a fraction of the channels; got {value:g}.{_percent_hint(value)}")
    return value


def _min_keep(value: Any) -> Any:
    floors = value if isinstance(value, dict) else {"min_keep": value}
    for name, floor in floors.items():
        if not isinstance(name, str) or isinstance(floor, bool) or not isinstance(floor, (int, float)):
            raise refuse(f"expected a number, or a mapping such as {{model.layers.0.mlp: 0.8}}; got {value!r}")
        if not (0 <= floor <= 1 or (floor > 1 and float(floor).is_integer())):
            message = "must be a share of the channels in [0, 1], or a whole number of channels"
            raise refuse(f"{message}; got {floor:g}.{_percent_hint(floor)}")
    return value


def _device_map(value: Any) -> Any:
    plain = isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, (str, int)) and not isinstance(v, bool) for k, v in value.items()
    )
    if value is None or plain or (isinstance(value, str) and value.strip()):
        return value
    raise refuse(f"expected text such as 'auto', or a mapping from module to device; got {value!r}")


def _max_memory(value: Any) -> Any:
    if value is None:
        return value
    if not isinstance(value, dict) or not value:
        raise refuse(f"expected a mapping from device to memory, such as {{'0': 20GiB, cpu: 60GiB}}; got {value!r}")
    for place, amount in value.items():
        if isinstance(amount, bool) or not re.fullmatch(MEMORY, str(amount)):
            raise refuse(f"the limit of {place!r} must be bytes or text such as 20GiB; got {amount!r}")
    return value


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise refuse(f"{twice[0]!r} is listed twice; list each value once")
    return values


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise refuse("the list is empty; give at least one value")
    return values


def _bounds(**limits: float) -> Any:
    return Field(json_schema_extra={**limits})


def _names(kind: str) -> Any:
    """Mark a registered name for `ffnscope.run.json_schema`, which lists the names."""
    return Field(json_schema_extra={NAMES_OF: kind})


Text = Annotated[StrictStr, AfterValidator(_not_blank)]
FolderName = Annotated[StrictStr, AfterValidator(_not_blank), AfterValidator(_folder_name)]
Device = Annotated[StrictStr, AfterValidator(_device), Field(json_schema_extra={"pattern": _DEVICE})]
DeviceMap = Annotated[
    str | dict[str, str | int] | None,
    BeforeValidator(_device_map),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}),
]
MaxMemory = Annotated[
    dict[str, str | int] | None,
    BeforeValidator(_max_memory),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]}),
]
MinKeep = Annotated[
    float | dict[str, float],
    BeforeValidator(_min_keep),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "object", "additionalProperties": {"type": "number"}}]}),
]
Count = Annotated[StrictInt, Field(ge=1)]
Length = Annotated[StrictInt, Field(ge=2)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Sparsity = Annotated[float, Strict(), AfterValidator(_sparsity), _bounds(minimum=0, exclusiveMaximum=1)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Fraction = Annotated[float, Strict(), AfterValidator(_fraction), _bounds(exclusiveMinimum=0, exclusiveMaximum=1)]
MetricName = Annotated[StrictStr, AfterValidator(_metric_name), _names("metric")]
OwnModule = Annotated[StrictStr, AfterValidator(_not_blank), AfterValidator(_own_module)]
AllocatorName = Annotated[StrictStr, AfterValidator(_allocator_name), _names("allocator")]
Distinct = AfterValidator(_no_repeats)
NotEmpty = AfterValidator(_not_empty)
Keywords = dict[str, JsonValue]
