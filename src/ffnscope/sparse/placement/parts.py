"""One FFN in two parts, and a model whose FFNs are: hot rows on one device, cold ones on the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.sparse.ffn import check_site
from ffnscope.sparse.kernels.ffn import RowWeights, sparse_ffn
from ffnscope.sparse.placement.plan import Placement
from ffnscope.sparse.runtime import ACTIVATION_NAMES
from ffnscope.types import FFNSite, FFNWeights

Selectors = Mapping[FFNSite, Callable[[Tensor], Tensor]]


class SplitFFN:
    """An FFN whose hot rows lie on one device and whose cold rows lie on another.

    Args:
        weights: canonical weights; both parts are copies.
        hot: channels [n] int64 of the fast part.
        act: activation, as `sparse_ffn` takes it.
        fast: device of the hot rows.
        slow: device of the cold rows.
    """

    def __init__(self, weights: FFNWeights, hot: Tensor, act: str, fast: torch.device, slow: torch.device):
        d_ff = weights.up.shape[0]
        self.is_hot = torch.zeros(d_ff, dtype=torch.bool).index_fill_(0, hot, True)
        cold = (~self.is_hot).nonzero().flatten()
        self.place = torch.empty(d_ff, dtype=torch.int32)
        for index in (hot, cold):
            self.place[index] = torch.arange(index.numel(), dtype=torch.int32)
        self.parts = tuple(
            (RowWeights.of(_rows(weights, index, device)), device) for index, device in ((hot, fast), (cold, slow))
        )
        self.act, self.bias = act, weights.down_bias

    def __call__(self, x: Tensor, index: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The FFN on channels ``index`` [k] for x [T, d_model]; ``token_mask`` [T, k] as in `sparse_ffn`.

        The fast part is started first, and runs at the same time where its device is not the CPU.
        """
        index = index.long().cpu()
        inputs = [x.to(device) for _, device in self.parts]  # a copy would wait for what was started before it
        found: list[Tensor] = []
        both = zip((self.is_hot[index], ~self.is_hot[index]), self.parts, inputs, strict=True)
        for chosen, (rows, device), own_x in both:
            if bool(chosen.any()):
                own = None if token_mask is None else token_mask[:, chosen.to(token_mask.device)].to(device)
                found.append(sparse_ffn(own_x, rows, self.place[index[chosen]].to(device), self.act, token_mask=own))
        y = sum((part.to(x.device) for part in found), torch.zeros_like(x))
        return y if self.bias is None else y + self.bias.to(x.device)


@contextlib.contextmanager
def split_(
    model: Any,
    placement: Placement,
    selectors: Selectors,
    *,
    fast: torch.device | str = "cuda",
    slow: torch.device | str = "cpu",
) -> Generator[Any]:
    """Within the block, decode with hot channels on ``fast`` and cold ones on ``slow``; in place.

    All that is not FFN is on ``fast``, with a copy of the hot rows; the FFN modules are on ``slow``, which has a copy
    of the cold rows too, and run there dense where many tokens are read at once. A step with one new token per sequence
    computes the selected channels only: the result is that of the model with h multiplied by the mask. A prompt is read
    without it, so also without the thresholds of `NonZero`. At the end the model is back on its device, as it was.

    Args:
        model: a `transformers` causal LM on one device, whose FFNs are modules of their own.
        placement: of its FFNs.
        selectors: site -> rule, x [T, d_model] -> mask [T, d_ff]; it gets x on ``slow``.
        fast: device of the hot rows.
        slow: device of the cold rows.

    Raises:
        UsageError: the placement and the selectors are for other FFNs.
        NotAvailableError: an FFN that is no module of its own, or whose activation the kernels do not know or do not
            compute as the module does (FATReLU: take the plain ReLU model with `NonZero` selectors instead).
    """
    fast, slow = torch.device(fast), torch.device(slow)
    if placement.hot.keys() != selectors.keys():
        raise UsageError("the placement and the selectors are for different FFNs; make both for the same model.")
    home = next(model.parameters()).device
    split = {site: _split(model, site, placement.hot[site], fast, slow) for site in selectors}
    modules = {site: model.get_submodule(site.path) for site in selectors}
    try:
        model.to(fast)
        for site, module in modules.items():
            module.to(slow)
            module.forward = _forward(module.forward, split[site], selectors[site], slow)
        yield model
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
        model.to(home)


def _split(model: Any, site: FFNSite, hot: Tensor, fast: torch.device, slow: torch.device) -> SplitFFN:
    check_site(site)
    module = model.get_submodule(site.path)
    own = {id(p) for name in site.projections for p in model.get_submodule(name).parameters()}
    whole = bool(site.path) and {id(p) for p in module.parameters()} <= own
    if not whole or "forward" in vars(module) or site.activation not in ACTIVATION_NAMES:
        raise NotAvailableError(
            f"{site.name} is no module of its own with one of the activations {', '.join(ACTIVATION_NAMES)}; only such "
            "FFNs are split between devices."
        )
    weights = weights_of(model, site)
    made = SplitFFN(weights, hot, ACTIVATION_NAMES[site.activation], fast, slow)
    x = torch.randn(1, site.d_model, generator=torch.Generator().manual_seed(0)).to(weights.up)
    with torch.no_grad():
        wanted, found = module(x[None])[0], made(x, torch.arange(site.d_ff))
    if float((found - wanted).abs().max()) > 0.05 * float(wanted.abs().max()):
        raise NotAvailableError(
            f"{site.name} computes something else between its projections than {site.activation}, so it cannot be "
            "split. A model with thresholds: remove them, and select with NonZero."
        )
    return made


def _forward(
    dense: Callable[[Tensor], Tensor], split: SplitFFN, selector: Callable[[Tensor], Tensor], slow: torch.device
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1:
            return dense(x.to(slow)).to(x.device)
        flat = x[:, 0]
        mask = selector(flat.to(slow))
        index = mask.any(0).nonzero().flatten()
        own = None if len(flat) == 1 else mask[:, index]
        return split(flat, index, own)[:, None]

    return forward


def _rows(weights: FFNWeights, index: Tensor, device: torch.device) -> FFNWeights:
    """Some channels of an FFN on a device, without the bias of down, which is added once."""

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, index.to(tensor.device)).to(device)

    up = part(weights.up)
    assert up is not None
    down = weights.down.index_select(1, index.to(weights.down.device)).to(device)
    biases = {"gate_bias": part(weights.gate_bias), "up_bias": part(weights.up_bias), "down_bias": None}
    return replace(weights, gate=part(weights.gate), up=up, down=down, **biases)
