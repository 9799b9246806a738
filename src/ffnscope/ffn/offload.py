"""Weights that accelerate keeps outside the model (in memory or on disk) until a module computes.

Such a weight is empty (on the meta device) between forwards; its value is in the ``weights_map`` of an accelerate hook,
a dictionary of tensors or a loader of files. Here, and nowhere else, these maps are read and changed. What is written
goes to memory for a weight in memory, and to new files for a weight on disk: the files of a checkpoint never change.
"""

from __future__ import annotations

import contextlib
import uuid
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import ModelError, UsageError
from ffnscope.ffn.heap import give_back_free
from ffnscope.ffn.messages import reading
from ffnscope.ffn.own_folder import OwnFolder
from ffnscope.ffn.projection import coupled
from ffnscope.io import write_tensors
from ffnscope.types import FFNSite

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Where accelerate keeps the value of one offloaded tensor: a key in the map of a hook."""

    hook: Any
    key: str
    dtype: torch.dtype

    @property
    def value(self) -> Tensor:
        """The value, where it is kept; read from disk now when it is there. Raises ModelError where it cannot be."""
        with reading(self.key, lambda: self.file):
            return self.hook.weights_map[self.key].to(self.dtype)

    @property
    def has_rows(self) -> bool:
        """Whether `rows` reads no more than is asked for: the value is in safetensors, or in memory."""
        if isinstance(self.hook.weights_map, _Edited):
            return False
        root, name = _root(self.hook.weights_map, self.key)
        memory: Mapping[str, Tensor] = getattr(root, "state_dict", root)
        return name in memory or root.index[name].get("safetensors_file") is not None

    @property
    def file(self) -> tuple[Path, str] | None:
        """The safetensors that hold the value, and its name there; None where it is in memory, or edited."""
        if isinstance(self.hook.weights_map, _Edited):
            return None
        root, name = _root(self.hook.weights_map, self.key)
        if name in getattr(root, "state_dict", root) or "safetensors_file" not in root.index[name]:
            return None
        return Path(root.index[name]["safetensors_file"]), root.index[name].get("weight_name", name)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some rows of the value, a slice or those of some indices, read now, on the CPU; see `has_rows`.

        Raises:
            ModelError: the file is gone or damaged.
        """
        from safetensors import safe_open

        root, name = _root(self.hook.weights_map, self.key)
        memory: Mapping[str, Tensor] = getattr(root, "state_dict", root)
        if name in memory:
            return memory[name][which].to(self.dtype)
        place = root.index[name]
        with reading(self.key, lambda: self.file), safe_open(place["safetensors_file"], framework="pt") as file:
            stored = file.get_slice(place.get("weight_name", name))
            if isinstance(which, slice):
                return stored[which].to(self.dtype)
            return torch.cat([stored[i : i + 1] for i in which.tolist()]).to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Device that computes with it."""
        return torch.device("cpu" if self.hook.execution_device is None else self.hook.execution_device)


def is_offloaded(tensor: Tensor) -> bool:
    """Whether a tensor of a model is empty because its value is kept elsewhere."""
    return tensor.device.type == "meta"


def stored(model: nn.Module, module: nn.Module, name: str) -> Stored:
    """Find the value of the offloaded tensor ``name`` of ``module``.

    Raises:
        ModelError: nothing keeps a value; the model was built on the meta device and never loaded.
    """
    tensor = getattr(module, name)
    for prefix, holder in _holders(model, module):
        for hook in _hooks(holder):
            key = f"{prefix}{name}"
            if getattr(hook, "offload", False) and hook.weights_map is not None and _holds(hook.weights_map, key):
                return Stored(hook, key, tensor.dtype)
    path = next((f"{p}.{name}" for p, m in model.named_modules() if m is module), name)
    raise ModelError(
        f"{path} is on the meta device and has no value: no accelerate hook keeps one. Load the model with its weights "
        "(load_model), or offload it with accelerate.cpu_offload or disk_offload."
    )


def check_values(model: nn.Module, site: FFNSite) -> None:
    """Raise ModelError when a weight of a site has no value, neither in the model nor offloaded."""
    for module in _modules(model, site):
        for name, parameter in module.named_parameters(recurse=False):
            if is_offloaded(parameter):
                stored(model, module, name)


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the model's ``state_dict`` one by one, offloaded ones with their values.

    Raises:
        ModelError: an entry has no value.
    """
    for name, value in model.state_dict().items():
        yield name, value_of(model, name, value)


@contextlib.contextmanager
def materialised(model: nn.Module, *sites: FFNSite, write: bool = False) -> Generator[None]:
    """Within the block, the offloaded weights of the sites are in the model, on the device that computes with them.

    Everything that reads weights works inside, `weights_of` too; what is not offloaded stays as it is. Do not run the
    model inside. On exit the weights are offloaded again.

    Args:
        model: the model of the sites.
        *sites: FFNs whose weights are wanted; memory is needed for all of them together.
        write: keep what the block changed, also other shapes. When the block raises, nothing is kept. Without it, the
            block must not change a weight.

    Raises:
        ModelError: a weight has no value.
        UsageError: ``write`` while the model is masked.
        ArtifactError: a changed weight cannot be written to disk.
    """
    held: list[_Held] = []
    try:
        for module in dict.fromkeys(m for site in sites for m in _modules(model, site)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if is_offloaded(parameter):
                    held.append(_Held(module, name, stored(model, module, name), parameter.shape))
                    held[-1].load(copy=write)
        yield
        if write:
            # all files first: when one cannot be written, none of the stored values has changed
            for keep in [one.prepare() for one in held]:
                keep()
    except BaseException:
        for one in held:
            one.offload(one.shape)
        raise
    for one in held:
        one.offload(one.parameter.shape)


@contextlib.contextmanager
def resident(model: nn.Module, *modules: nn.Module) -> Generator[None]:
    """Within the block, the offloaded weights of these modules and all that is in them stay in the model.

    They are read once, on the device that computes with them, however often the modules run; nothing is kept of what is
    changed. On exit they are offloaded again, and free memory goes back to the system. Weights that are not offloaded
    are left alone, so contexts nest.

    Raises:
        ModelError: a weight has no value.
    """
    held: list[_Held] = []
    hooks: dict[int, Any] = {}
    try:
        for module in dict.fromkeys(part for one in modules for part in one.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if is_offloaded(parameter):
                    held.append(_Held(module, name, stored(model, module, name), parameter.shape))
                    held[-1].load(copy=False)
                    hooks[id(held[-1].place.hook)] = held[-1].place.hook
        for hook in hooks.values():
            hook.offload = False
        yield
    finally:
        for hook in hooks.values():
            hook.offload = True
        for one in held:
            one.offload(one.shape)
        if held:
            give_back_free()


@contextlib.contextmanager
def edited(model: nn.Module, module: nn.Module, name: str, edit: Edit) -> Generator[None]:
    """Within the block, whoever reads an offloaded parameter, the forward included, gets ``edit(value)``.

    The stored value does not change, so nothing has to be put back. ``edit`` must return a new tensor of the same
    shape. Contexts nest.
    """
    place = stored(model, module, name)
    before = place.hook.weights_map
    try:
        place.hook.weights_map = _Edited(before, place.key, edit)
        yield
    finally:
        place.hook.weights_map = before


@contextlib.contextmanager
def saving(model: Any) -> Generator[dict[str, Any]]:
    """Yield arguments with which ``model.save_pretrained`` also writes offloaded weights, shard by shard.

    Nothing is changed for a model without offload. Weights that are tied are written once, as for any other model.
    """
    state: dict[str, Tensor] = model.state_dict()
    if not any(is_offloaded(value) for value in state.values()):
        yield {}
        return
    once = {name: state[name] for name in names_once(model)}
    before = getattr(model, "hf_device_map", None)
    try:
        model.hf_device_map = {"": "cpu"}  # by this `save_pretrained` knows that it has to fetch weights
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield {"state_dict": once}
    finally:
        del model.hf_device_map
        if before is not None:
            model.hf_device_map = before


def names_once(model: nn.Module) -> list[str]:
    """Names of the entries of the model's ``state_dict``, without weights that are tied to another entry."""
    state: dict[str, Tensor] = model.state_dict()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return [name for name in state if not _is_copy(model, state, name, tied.get(name))]


def placement(model: nn.Module) -> str:
    """Where the weights are, for records: "cpu", "cuda:0, cuda:1", "cpu, offloaded"."""
    found = {"offloaded" if is_offloaded(p) else str(p.device) for p in model.parameters()}
    return ", ".join(sorted(found))


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """Set ``requires_grad`` of a parameter, also of one that a forward in inference mode has emptied."""
    parameter = getattr(module, name)
    if is_offloaded(parameter) and parameter.requires_grad != flag:
        _set(module, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), flag)
    else:
        parameter.requires_grad_(flag)


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """An offloaded parameter that is in the model for a while."""

    module: nn.Module
    name: str
    place: Stored
    shape: torch.Size

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    def load(self, *, copy: bool) -> None:
        """Put the value into the model; without a copy, a change could reach a value that is kept in memory."""
        value = self.place.value.to(self.place.device)
        _set(self.module, self.name, value.clone() if copy else value, self.parameter.requires_grad)

    def prepare(self) -> Callable[[], None]:
        """Write the value to disk when it belongs there; return what puts it in the place of the stored one."""
        return _replacing(self.place.hook.weights_map, self.place.key, self.parameter.detach().cpu())

    def offload(self, shape: torch.Size) -> None:
        """Empty the parameter again."""
        value = torch.empty(shape, dtype=self.place.dtype, device="meta")
        _set(self.module, self.name, value, self.parameter.requires_grad)


@dataclass(frozen=True, slots=True, eq=False)
class _Edited(Mapping[str, Tensor]):
    """A map of weights of which one is edited when it is read."""

    before: Mapping[str, Tensor]
    edited: str
    edit: Edit

    def __getitem__(self, key: str) -> Tensor:
        value = self.before[key]
        return self.edit(value) if key == self.edited else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.before)

    def __len__(self) -> int:
        return len(self.before)


def _modules(model: nn.Module, site: FFNSite) -> list[nn.Module]:
    """Modules that hold the weights of a site, each once."""
    none = torch.zeros(0, dtype=torch.int64)
    return list(dict.fromkeys(entry.module for entry in coupled(model, site, none)))


def _is_copy(model: nn.Module, state: Mapping[str, Tensor], name: str, source: str | None) -> bool:
    """Whether an entry is the same weight as the entry ``source`` that it is tied to."""
    if source is None or source not in state:
        return False
    if not is_offloaded(state[name]):
        return state[name].data_ptr() == state[source].data_ptr()
    return torch.equal(*(value_of(model, n, state[n]).cpu() for n in (name, source)))


def value_of(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The value of an entry of the model's ``state_dict``, read now where it is offloaded."""
    if not is_offloaded(value):
        return value
    path, _, leaf = name.rpartition(".")
    return stored(model, model.get_submodule(path), leaf).value


def _holders(model: nn.Module, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module itself, then modules whose hook also places the weights of their submodules, with the key's prefix."""
    yield "", module
    for holder in model.modules():
        if holder is not module and any(getattr(h, "place_submodules", False) for h in _hooks(holder)):
            yield from ((f"{name}.", holder) for name, m in holder.named_modules() if m is module)


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _root(weights: Any, key: str) -> tuple[Any, str]:
    """The map that holds the values, and the key in it, behind prefixes and edits."""
    while True:
        if isinstance(weights, _Edited):
            weights = weights.before
        elif hasattr(weights, "prefix"):
            weights, key = weights.dataset, f"{weights.prefix}{key}"
        else:
            return weights, key


def _holds(weights: Any, key: str) -> bool:
    """Whether a map has a value; ``in`` would read the file of a weight on disk."""
    root, name = _root(weights, key)
    return name in root if isinstance(root, dict) else name in root.state_dict or name in root.index


def _set(module: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    with torch.inference_mode(False):
        # a value made in inference mode cannot be part of a graph
        value = value.clone() if value.is_inference() else value
        setattr(module, name, nn.Parameter(value, requires_grad=requires_grad))


def _replacing(weights: Any, key: str, value: Tensor) -> Callable[[], None]:
    """Return what replaces one stored value: in memory where it is in memory, else by a file that is written now."""
    if isinstance(weights, _Edited):
        raise UsageError("the weights of a masked model cannot be changed; leave the `masked` block first.")
    root, name = _root(weights, key)
    memory: dict[str, Tensor] = getattr(root, "state_dict", root)
    if name in memory:
        return partial(memory.__setitem__, name, value)
    path = _folder(root) / f"{name}-{uuid.uuid4().hex}.safetensors"
    write_tensors(path, {name: value}, {"kind": "offloaded weight"})
    place = {"safetensors_file": str(path), "weight_name": name, "dtype": str(value.dtype).removeprefix("torch.")}
    return partial(root.index.__setitem__, name, place)


def _folder(loader: Any) -> Path:
    """New folder for changed weights of a loader, beside those that it reads; removed when the loader is."""
    found: OwnFolder | None = getattr(loader, "ffnscope_folder", None)
    if found is None:
        parent = None if loader.save_folder is None else Path(loader.save_folder)
        found = loader.ffnscope_folder = OwnFolder(parent, "ffnscope-weights")
        weakref.finalize(loader, found.remove)
    return found.path
