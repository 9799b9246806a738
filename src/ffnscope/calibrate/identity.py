"""Whether processes have the same model: the same values, the same modules, and the same answer to a few tokens.

No part is enough alone. A few tokens do not reach every row of an embedding or every expert; values do not tell of an
activation that was replaced; and modules do not tell of code that was patched, which only the answer shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ffnscope.calibrate.forward import max_positions
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.offload import Stored, is_offloaded, stored
from ffnscope.ffn.survey import probe_ids
from ffnscope.io import checksum_tensors, hash_json
from ffnscope.unchanged import Stamp, stamp

TOKENS = 8
ROUNDING = 64  # times the precision of the weights: what other kernels or threads may change in the logits
MOST = 0.05
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_READ: dict[tuple[Path, str, str], tuple[Stamp, int]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """What two processes compare of a model.

    Attributes:
        exact: hash of its config, its modules and all values.
        logits: [1, T, vocab] of the first T tokens of the vocabulary, on the CPU.
        precision: spacing of numbers near 1 in the coarsest dtype of its weights.
    """

    exact: str
    logits: Tensor
    precision: float

    def agrees(self, other: Identity) -> bool:
        """Whether another model has the same values and modules, and the same logits up to rounding."""
        return self.difference(other) is None

    def difference(self, other: Identity) -> str | None:
        """What another model has that this one has not, in words; None where they agree."""
        if self.exact != other.exact or self.logits.shape != other.logits.shape:
            return "another config, other modules or other values"
        largest = float(self.logits.nan_to_num(posinf=0, neginf=0).abs().max())
        allowed = min(ROUNDING * self.precision, MOST) * largest
        same = torch.allclose(self.logits, other.logits, rtol=0, atol=allowed, equal_nan=True)
        return None if same else "other logits for the same tokens and values"


def identity_of(model: nn.Module) -> Identity:
    """Read every value and run a few tokens.

    Nothing is remembered from call to call but the checksums of values that stay in files, which are taken anew when
    the `stamp` of the file has changed: a model that is streamed is read once, by the tokens.

    Raises:
        ModelError: a weight is on the meta device without a value.
    """
    exact = hash_json([repr(getattr(model, "config", None)), list(_modules(model)), list(_values(model))])
    length = min(TOKENS, max_positions(model) or TOKENS)
    with frozen(model), torch.no_grad():
        logits: Tensor = cast("Any", model)(input_ids=probe_ids(model, length), use_cache=False).logits
    kinds = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return Identity(exact, logits.cpu().double(), max((torch.finfo(kind).eps for kind in kinds), default=0.0))


def _modules(model: nn.Module) -> Iterator[list[Any]]:
    """Of every module: name, class, settings, hooks, and a forward of its own."""
    for name, module in model.named_modules():
        own = vars(module)
        plain = {k: repr(v) for k, v in own.items() if isinstance(v, (bool, int, float, str)) and k != "training"}
        hooks = [len(own.get(kind, ())) for kind in _HOOKS]
        yield [name, _name(type(module)), plain, hooks, _name(own["forward"]) if "forward" in own else None]


def _name(what: Callable[..., Any]) -> str:
    while isinstance(what, partial):  # how accelerate replaces a forward
        what = what.func
    return f"{what.__module__}.{getattr(what, '__qualname__', type(what).__qualname__)}"


def _values(model: nn.Module) -> Iterator[list[Any]]:
    """Name and checksum of every weight and buffer, also of buffers that no checkpoint has."""
    state = dict(model.state_dict())
    state |= {name: value for name, value in model.named_buffers() if not is_offloaded(value)}
    for name, value in state.items():
        if is_offloaded(value):
            path, _, leaf = name.rpartition(".")
            yield [name, _stored_checksum(stored(model, model.get_submodule(path), leaf))]
        else:
            yield [name, checksum_tensors({"": value})]


def _stored_checksum(place: Stored) -> int:
    if place.file is None:
        return checksum_tensors({"": place.value})
    path, name = place.file
    key, now = (path, name, str(place.dtype)), stamp(path)
    known = _READ.get(key)
    if known is not None and known[0] == now:
        return known[1]
    found = checksum_tensors({"": place.value})
    if now is not None:
        _READ[key] = now, found
    return found
