"""Put ReLU or FATReLU where a model has another activation function, such that plain transformers builds the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import NotAvailableError, UsageError, unknown_name
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.survey import probe_ids
from ffnscope.sparse.ffn import check_site
from ffnscope.sparse.streaming import trace_rounds
from ffnscope.types import FFNSite

ACTIVATIONS = ("relu", "relu2")
"""What can be put in: names that transformers knows, so that a config can name them."""
FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
PROBE_TOKENS = 16


class FATReLU(nn.Module):
    """act(x) where x >= threshold, else 0: an activation with a shifted threshold (ProSparse, arXiv:2402.13516).

    NaN stays NaN.
    """

    def __init__(self, threshold: float, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.threshold = check_threshold(threshold)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return torch.where(x < self.threshold, torch.zeros((), dtype=x.dtype, device=x.device), self.act(x))

    def extra_repr(self) -> str:
        """The threshold."""
        return f"threshold={self.threshold:g}"


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a module holds an activation function."""

    path: str
    parent: nn.Module
    name: str

    @property
    def held(self) -> nn.Module:
        """What is there now."""
        return self.parent.get_submodule(self.name)

    def put(self, act: nn.Module) -> None:
        """Put another one there."""
        setattr(self.parent, self.name, act)


def replace_activation_(model: Any, activation: str = "relu") -> list[FFNSite]:
    """Give all FFNs of a model another activation function, in modules and in the config, in place.

    The weights stay as they are. A model that has the activation already stays as it is.

    Args:
        model: a `transformers` causal LM whose FFNs are dense.
        activation: "relu", or "relu2" for its square.

    Returns:
        The FFNs of the changed model.

    Raises:
        UnknownNameError: another activation.
        NotAvailableError: experts, FFNs that are used several times, a norm before down; or an activation that is not
            taken from a field of the config, so that it cannot be replaced in a way that transformers loads. The model
            is then unchanged.
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    sites = _dense_sites(model)
    config = model.config.get_text_config()
    field = _field(config)
    before = getattr(config, field)
    found = [place for site in sites for place in places(model, site)]
    if before == activation:
        return sites
    held = [place.held for place in found]
    setattr(config, field, activation)
    try:
        for place in found:
            place.put(_named(activation))
        _check_fresh(model, field)
        changed = find_sites(model)
        _check_computed(model, changed, activation)
    except BaseException:
        setattr(config, field, before)
        for place, act in zip(found, held, strict=True):
            place.put(act)
        raise
    return changed


def set_thresholds_(model: nn.Module, thresholds: Mapping[FFNSite, float]) -> None:
    """Shift the thresholds of ReLU activations, in place; 0 puts the plain ReLU back.

    The thresholds are no part of a checkpoint: see `read_thresholds`. Find the FFNs before: a threshold far above 1
    hides their channels from `find_sites`, which tries them with standard normal numbers.

    Raises:
        UsageError: a threshold is negative or not finite; nothing is changed.
        NotAvailableError: the activation of an FFN is not `relu` or `relu2`.
    """
    checked = {site: check_threshold(value) for site, value in thresholds.items()}
    for site in checked:
        if site.activation not in ACTIVATIONS:
            raise NotAvailableError(
                f"{site.name} has the activation {site.activation!r}; thresholds are for {' and '.join(ACTIVATIONS)}. "
                "Make it a ReLU model first (ffnscope relufy)."
            )
    for site, value in checked.items():
        plain = _named(site.activation)
        for place in places(model, site):
            place.put(plain if value == 0 else FATReLU(value, plain))


def places(model: nn.Module, site: FFNSite) -> list[Place]:
    """The activation modules of an FFN: children of its module or of modules that hold its projections.

    Raises:
        NotAvailableError: there is none of the class that the config names.
    """
    kinds = (*([type(_named(site.activation))] if site.activation != "unknown" else []), FATReLU)
    found = [
        Place(f"{path}.{name}" if path else name, parent, name)
        for path, parent in ((path, model.get_submodule(path)) for path in _parents(site))
        for name, child in parent.named_children()
        if type(child) in kinds
    ]
    if not found:
        raise _cannot(
            site, f"no module of it computes {site.activation!r}, the activation that the config names (or names none)"
        )
    return found


def check_threshold(value: float) -> float:
    """Raise UsageError unless a threshold is finite and not negative."""
    if not 0 <= value < float("inf"):
        raise UsageError(f"a threshold of FATReLU must be 0 or more, and finite; got {value:g}.")
    return value


def _dense_sites(model: Any) -> list[FFNSite]:
    if len(probe_ids(model, 1)) > 1:
        raise NotAvailableError(f"{type(model).__name__} reads several codebooks at once, not text; use another model.")
    sites = find_sites(model)
    for site in sites:
        if site.expert is not None:
            raise NotAvailableError(
                f"{site.name} is an expert; activations are replaced in models whose FFNs are all dense."
            )
        check_site(site)
    return sites


def _field(config: Any) -> str:
    for name in FIELDS:
        if isinstance(getattr(config, name, None), str):
            return name
    raise NotAvailableError(
        f"the config of {config.model_type} has none of the fields {', '.join(FIELDS)}, so the activation is fixed in "
        "its code and cannot be replaced in a way that transformers loads. Use another model."
    )


def _named(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise NotAvailableError(f"transformers knows no activation function {name!r}; it cannot be replaced.")
    return ACT2FN[name]


def _parents(site: FFNSite) -> Iterator[str]:
    """Paths of modules that may hold the activation of an FFN."""
    inner = [name.rpartition(".")[0] for name in (site.gate, site.up, site.down) if name is not None]
    yield from dict.fromkeys(".".join(part for part in (site.path, name) if part) for name in ["", *inner])


@torch.no_grad()
def _check_fresh(model: Any, field: str) -> None:
    """Raise NotAvailableError unless what the config builds, with the weights of the model, computes the same.

    The second model shares all weights and buffers with the first.
    """
    with torch.device("meta"):
        fresh = type(model)(model.config).eval()
    value = getattr(model.config.get_text_config(), field)
    for path, module in model.named_modules():
        built = fresh.get_submodule(path)
        if type(built) is not type(module):
            raise NotAvailableError(
                f"with {field} = {value!r} {type(model).__name__} builds {type(built).__name__} at {path}, where this "
                f"model has {type(module).__name__}: the field is not what decides about the FFNs, and only about "
                "them, so a changed model could not be loaded. The model was not changed; use another one."
            )
    fresh.load_state_dict(model.state_dict(), strict=False, assign=True)
    for path, buffer in model.named_buffers():
        owner, _, name = path.rpartition(".")
        fresh.get_submodule(owner)._buffers[name] = buffer
    ids = probe_ids(model, PROBE_TOKENS)
    expected, found = (one(input_ids=ids, use_cache=False).logits for one in (model, fresh))
    if not torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max())):
        raise NotAvailableError(
            f"with {field} = {value!r} the config of {type(model).__name__} builds a model that computes something "
            "else: the field also decides about other parts than FFNs, so a changed model could not be loaded. The "
            "model was not changed; use another one."
        )


def _check_computed(model: Any, sites: Sequence[FFNSite], activation: str) -> None:
    """Raise NotAvailableError unless every FFN now computes with the activation."""
    windows = contiguous_windows(probe_ids(model, PROBE_TOKENS), "probe")
    for found in trace_rounds(model, sites, [windows]):
        for site, inputs in found.items():
            if inputs.activation != activation:
                raise _cannot(site, f"after it was replaced the FFN still computes with {inputs.activation!r}")


def _cannot(site: FFNSite, why: str) -> NotAvailableError:
    return NotAvailableError(f"the activation function of {site.name} cannot be replaced: {why}. Use another model.")
