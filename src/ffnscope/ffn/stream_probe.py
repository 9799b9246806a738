"""One forward over a few texts of a single token, in which every projection puts out random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.projection import is_projection
from ffnscope.ffn.unread import unread_projections
from ffnscope.types import FFNSite

TEXTS = 6


@dataclass(slots=True)
class Call:
    """One module's run: its input and output [TEXTS, width], and when it ran."""

    x: Tensor
    y: Tensor
    when: int


@dataclass(slots=True)
class Seen:
    """Runs of projections and of norms of the stream, and inputs of experts and of the modules around them."""

    projections: dict[str, Call] = field(default_factory=dict[str, Call])
    norms: dict[str, Call] = field(default_factory=dict[str, Call])
    experts: dict[str, Call] = field(default_factory=dict[str, Call])

    @property
    def count(self) -> int:
        """Runs so far, which tells when the next one was."""
        return len(self.projections) + len(self.norms) + len(self.experts)


@contextlib.contextmanager
def _watched(model: nn.Module, sites: Sequence[FFNSite], seen: Seen) -> Generator[None]:
    random = torch.Generator().manual_seed(0)
    handles: list[Any] = []
    width = sites[0].d_model
    experts = {path for site in sites if site.expert is not None for path in around(site)}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        for name, module in model.named_modules():
            if is_projection(module):
                handles.append(module.register_forward_hook(_replace(seen, name, random)))
            elif name in experts:
                handles.append(module.register_forward_pre_hook(_keep_input(seen, name)))
            elif _is_norm(module):
                handles.append(module.register_forward_hook(_keep(seen, name, width)))
        yield


def around(site: FFNSite) -> list[str]:
    """The module that is given the tokens of an expert, and those around it within the layer, the innermost first."""
    layer = layer_path(site.path) or ""
    inside = site.group.removeprefix(layer).strip(".").split(".")
    return [".".join((layer, *inside[:n])).strip(".") for n in range(len(inside), 0, -1)]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def observe_stream(model: Any, sites: Sequence[FFNSite]) -> Seen:
    """Run the model once on `TEXTS` texts of one token; it is left as it was."""
    seen = Seen()
    table = model.get_input_embeddings()
    device = next((p.device for p in table.parameters()), torch.device("cpu"))
    ids = torch.arange(TEXTS, device="cpu" if device.type == "meta" else device)[:, None] + 3
    with frozen(model), torch.no_grad(), unread_projections(model), _watched(model, sites, seen):
        model(input_ids=ids % model.config.get_text_config().vocab_size, use_cache=False)
    return seen


def _replace(seen: Seen, name: str, random: torch.Generator) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        noise = torch.randn(output.shape, generator=random).to(output)
        if name not in seen.projections and args:
            seen.projections[name] = Call(_rows(args[0]), _rows(noise), seen.count)
        return noise.clone()

    return hook


def _keep(seen: Seen, name: str, width: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fits = bool(args) and isinstance(output, Tensor) and args[0].shape == output.shape
        if fits and output.shape[-1] == width and output.numel() == TEXTS * width and name not in seen.norms:
            seen.norms[name] = Call(_rows(args[0]), _rows(output), seen.count)

    return hook


def _keep_input(seen: Seen, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and name not in seen.experts:
            seen.experts[name] = Call(_rows(args[0]), _rows(args[0]), seen.count)

    return hook


def _rows(value: Tensor) -> Tensor:
    """[TEXTS, width] in float64 on the CPU, a copy: some models add in place."""
    return value.detach().reshape(-1, value.shape[-1]).cpu().double().clone()


def last_norm(
    seen: Seen, *, output: Tensor | None = None, source: Tensor | None = None, before: int | None = None
) -> str | None:
    """Norm that gave ``output`` last before a time, or that was given ``source``."""
    hits = [
        (call.when, name)
        for name, call in seen.norms.items()
        if (output is None or same(call.y, output))
        and (source is None or same(call.x, source))
        and (before is None or call.when < before)
    ]
    return max(hits)[1] if hits else None


def norm_weight(call: Call) -> Tensor:
    """Weight [d_model] of a norm as it acts: slope of its output in its normalised input, whichever norm it is."""
    centred = call.x - call.x.mean(1, keepdim=True)
    best: tuple[float, Tensor] | None = None
    for plain in (call.x, centred):
        unit = plain / plain.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        x, y = unit - unit.mean(0), call.y - call.y.mean(0)
        slope = (x * y).sum(0) / x.square().sum(0).clamp_min(1e-30)
        error = float((y - slope * x).square().sum())
        if best is None or error < best[0]:
            best = (error, slope.abs())
    assert best is not None
    return best[1]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two signals are the same up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-6)
