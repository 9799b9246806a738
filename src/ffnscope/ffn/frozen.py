"""A model held still while it is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from torch import nn

from ffnscope.ffn.offload import set_requires_grad


@contextlib.contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Put the model in eval mode without weight gradients; restore both on exit."""
    # by name: a forward replaces the parameters that are offloaded
    flags = [(m, n, p.requires_grad) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for module, name, _ in flags:
            set_requires_grad(module, name, flag=False)
        yield
    finally:
        for module, name, flag in flags:
            set_requires_grad(module, name, flag)
        for module, training in modes:
            module.training = training
