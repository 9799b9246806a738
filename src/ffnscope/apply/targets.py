"""Which matrices become sparse, what each of them reads, and sums over that."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ffnscope.apply.patterns import Pattern
from ffnscope.calibrate.blocks import list_of_blocks
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.statistics import h_outer
from ffnscope.calibrate.taps import SignalTap, channel_taps, input_taps
from ffnscope.errors import LayoutError, NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.matrices import Matrix, check_apart, linear_modules, matrices_of
from ffnscope.ffn.projection import reuse
from ffnscope.ffn.sites import find_sites
from ffnscope.types import FFNSite

Scope = Literal["ffn", "linear"]
OF: Mapping[Scope, str] = {
    "ffn": "weights of gate, up and down of every FFN",
    "linear": "weights of every linear module of the decoder blocks (attention and FFN)",
}


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix to make sparse.

    Attributes:
        matrix: which one.
        signal: name of what it reads; matrices that read the same share it.
        site: the FFN that it belongs to, with scope "ffn".
        makes_channels: whether it is gate or up (or both) of that FFN.
    """

    matrix: Matrix
    signal: str
    site: FFNSite | None = None
    makes_channels: bool = False

    @property
    def inside(self) -> str:
        """Path of the module that it is in, or that it is."""
        return self.matrix.path if self.site is None else self.site.path


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """All matrices of a scope, and the FFNs of the model."""

    scope: Scope
    all: tuple[Target, ...]
    sites: tuple[FFNSite, ...]

    def inside(self, block: str) -> list[Target]:
        """Those in one block."""
        return [target for target in self.all if f"{target.inside}.".startswith(f"{block}.")]


def find_targets(model: nn.Module, scope: Scope) -> Targets:
    """Find the matrices of a scope.

    Raises:
        UsageError: no such scope.
        LayoutError: no FFN was found.
        NotAvailableError: experts with scope "linear", matrices that are used more than once, offloaded weights.
    """
    if scope not in OF:
        raise UsageError(f"scope must be 'ffn' ({OF['ffn']}) or 'linear' ({OF['linear']}); got {scope!r}.")
    sites = find_sites(model)
    found = [target for site in sites for target in _of_site(site)] if scope == "ffn" else _linear(model, sites)
    check_apart(model, [target.matrix for target in found])
    return Targets(scope, tuple(found), tuple(sites))


def _of_site(site: FFNSite) -> list[Target]:
    return [
        Target(matrix, f"{site.name}/{'h' if name == site.down else 'x'}", site, name != site.down)
        for name, matrix in matrices_of(site).items()
    ]


def _linear(model: nn.Module, sites: Sequence[FFNSite]) -> list[Target]:
    expert = next((site for site in sites if site.expert is not None), None)
    if expert is not None:
        raise NotAvailableError(
            f"{expert.name} is an expert: scope 'linear' supports models without experts, whose routers and shared "
            "parameters are no plain linear modules. Use scope 'ffn', which prunes every expert on its own tokens."
        )
    return [Target(matrix, matrix.path) for matrix in linear_modules(model, list_of_blocks(model, sites)[0])]


def check_inputs(targets: Targets) -> None:
    """Raise NotAvailableError where the inputs of a matrix cannot be told, or come from several places."""
    for site in targets.sites:
        if site.n_uses > 1:
            raise NotAvailableError(
                f"{site.name} {reuse(site)}; unstructured sparsity from calibration supports FFNs that are used once. "
                "Use magnitude_weights."
            )
        if site.norm is not None and targets.scope == "ffn":
            raise NotAvailableError(
                f"{site.name} has a norm ({site.norm}) before its down projection, whose inputs are not its channels. "
                "Use scope 'linear', or magnitude_weights."
            )


def check_group(model: nn.Module, targets: Targets, pattern: Pattern) -> None:
    """Raise UsageError where the inputs of a matrix are not a multiple of the pattern's group."""
    for target in targets.all if pattern.group is not None else ():
        width = target.matrix.weight(model).shape[1]
        if pattern.group is not None and width % pattern.group[1]:
            raise UsageError(
                f"{target.matrix.name} has {width} inputs, which is no multiple of {pattern.group[1]}; the pattern "
                f"{pattern.label} does not fit. Use another pattern, or a fraction."
            )


@dataclass(slots=True, eq=False)
class InputSums:
    """Sums over tokens of what matrices read, in float64.

    Attributes:
        outer: whether second moments [in, in] are kept, or only squares [in].
        sums: signal -> sum; a signal without a token is absent.
        tokens: signal -> how many.
    """

    outer: bool
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, signal: str, rows: Tensor) -> None:
        """Add inputs [n, in]."""
        if not len(rows):
            return
        width = rows.shape[1]
        if signal not in self.sums:
            shape = (width, width) if self.outer else (width,)
            self.sums[signal] = rows.new_zeros(shape, dtype=torch.float64)
        if self.outer:
            h_outer(self.sums[signal], rows if rows.dtype == torch.float64 else rows.float())
        else:
            self.sums[signal] += rows.double().square().sum(0)
        self.tokens[signal] = self.tokens.get(signal, 0) + len(rows)

    def check(self) -> None:
        """Raise NonFiniteError for a sum that is not finite."""
        for signal, value in self.sums.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"the inputs of {signal} are NaN or infinite. In float16 this is usually an overflow: load the "
                    "model in bfloat16 or float32 (model.dtype)."
                )


@contextlib.contextmanager
def summed(
    model: nn.Module, targets: Sequence[Target], scope: Scope, valid: Tensor, sums: InputSums
) -> Generator[None]:
    """Within the block, add the inputs of these matrices at valid [b, T] tokens, of an expert at its own."""
    rows = TokenRows(valid)
    sites = list(dict.fromkeys(target.site for target in targets if target.site is not None))
    if scope == "linear":
        paths = [target.matrix.path for target in targets]
        with input_taps(model, paths, lambda path, x: sums.add(path, _valid_rows(path, x, valid))):
            yield
        return

    def add(site: FFNSite, name: str, value: Tensor) -> None:
        sums.add(f"{site.name}/{name}", rows.take(site, value))

    with channel_taps(model, sites, lambda s, h: add(s, "h", h), None, SignalTap(add, ("x",)), rows.route):
        yield


def _valid_rows(path: str, x: Tensor, valid: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) != valid.numel():
        raise LayoutError(
            f"{path} was given {len(flat)} rows for a batch of {tuple(valid.shape)} tokens; scope 'linear' supports "
            "modules that read one row per token. Use scope 'ffn'."
        )
    return flat if bool(valid.all()) else flat[valid.flatten().to(flat.device)]
