"""Causal LMs of `transformers` whose FFNs have different widths. Lies beside the weights and needs no other package.

``LlamaForCausalLM`` of this module is the class of that name of `transformers`, and the same for every other family.
It is built from the config as always; then the parameters named in ``config.ffnscope_narrowed`` get their shapes, and
the attributes named there (``in_features``, ``intermediate_size``, ...) their values. Load with
``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)``.
"""

from typing import Any

import torch
import transformers
from torch import nn

KEY = "ffnscope_narrowed"


def __getattr__(name: str) -> Any:
    """Make the class ``name`` from the one of `transformers`, once."""
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        narrow(self, getattr(config, KEY))

    def is_custom_code(cls: Any) -> bool:
        return False  # weights are stored under the names of the stock class, so its conversions apply

    body = {"__init__": __init__, "is_custom_code": classmethod(is_custom_code), "stock_class": stock}
    made = type(name, (stock,), {**body, "__module__": __name__, "_auto_class": "AutoModelForCausalLM"})
    return globals().setdefault(name, made)


@torch.no_grad()
def narrow(model: nn.Module, changes: dict[str, Any]) -> None:
    """Cut parameters and buffers to the shapes, and set attributes to the values, that ``changes`` gives by name.

    A parameter that several modules share stays shared.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, value in changes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        if not isinstance(old, torch.Tensor):
            setattr(module, leaf, value)
            continue
        if id(old) not in made:
            new = old[tuple(slice(0, size) for size in value)].clone()
            new = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
            made[id(old)] = old, new
        setattr(module, leaf, made[id(old)][1])
