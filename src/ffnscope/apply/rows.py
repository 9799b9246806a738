"""New rows of gate and up of FFNs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from ffnscope.apply.edits import Edit
from ffnscope.ffn.projection import coupled, down_projection, joined, projection
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRows:
    """Rows of some channels of one FFN, in their order: gate and up [k, d_model], biases [k]; None where it has none.

    A bias that is None is left as it is.
    """

    up: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Field -> tensor, without those that are None."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], site: FFNSite) -> ChannelRows | None:
        """Those of a site among the tensors of a file, FIELD/SITE each; None where it has none there."""
        names = [field.name for field in fields(cls)]
        found = {name: tensors[f"{name}/{site.name}"] for name in names if f"{name}/{site.name}" in tensors}
        return cls(**found) if "up" in found else None

    def to_cpu(self) -> ChannelRows:
        """The same in the memory of the CPU."""
        return ChannelRows(**{name: value.cpu() for name, value in self.tensors.items()})

    def misshapen(self, site: FFNSite, width: int) -> str | None:
        """What does not fit ``width`` channels of a site, in words; None where all does."""
        if (self.gate is None) != (site.gate is None):
            return f"{'no gate' if self.gate is None else 'a gate'} for an FFN {'with' if site.gate else 'without'} one"
        for name, value in self.tensors.items():
            wanted = (width,) if name.endswith("bias") else (width, site.d_model)
            if tuple(value.shape) != wanted:
                return f"expected {name} {wanted}, got {tuple(value.shape)}"
        return None


def row_edits(model: nn.Module, site: FFNSite, channels: Tensor, rows: ChannelRows) -> Iterator[Edit]:
    """The rows of some channels [k] as edits, however the model stores them; of an FFN of its own, not an expert."""
    down = down_projection(model, site)
    for entry in coupled(model, site, channels):
        if entry.module is down:
            continue
        suffix = "" if entry.name == "weight" else "_bias"
        gate, up = (getattr(rows, f"{role}{suffix}") for role in ("gate", "up"))
        if site.fused is not None:
            value = None if gate is None or up is None else joined(site, gate, up)
        else:
            value = gate if site.gate and entry.module is projection(model, site, site.gate) else up
        if value is not None:
            yield Edit(entry, value if entry.axis == 0 else value.T)
