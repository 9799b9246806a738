"""A pruned checkpoint that is written block by block: the dense model is left as it is, the pruned one never exists."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.export import SHARD, check_shard_size, config_changes
from ffnscope.apply.padding import Widths, field_widths, pad_, padded_plan, widest_widths
from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.apply.reconstruction import Reconstruction, rewrite_
from ffnscope.apply.slice import slice_shapes_
from ffnscope.apply.written_blocks import SUFFIX, WrittenBlocks, put
from ffnscope.ffn.heap import give_back_free
from ffnscope.ffn.offload import names_once, value_of
from ffnscope.ffn.projection import shape_of
from ffnscope.ffn.survey import survey
from ffnscope.ffn.vocabulary import SLICE
from ffnscope.io import hash_json, hash_tensors, plan_to_dict
from ffnscope.types import PruningPlan

PART = "part"
INDEX = "model.safetensors.index.json"


class BlockWriter:
    """Writes shards of one block each into a folder, then the rest, config and index.

    Memory: the weights of one block twice, then those outside the blocks: large ones one after the other.

    Args:
        model: the dense model; only read.
        folder: an empty folder in the making.
        plan: what stays, in all blocks.
        max_shard_size: a block larger than this takes several files.
        pad_to_widest: see `prune_`.
        written: blocks that an interrupted call has finished; None = all are written into ``folder``.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        plan: PruningPlan,
        *,
        max_shard_size: str = SHARD,
        pad_to_widest: bool = False,
        written: WrittenBlocks | None = None,
    ):
        check_shard_size(max_shard_size)
        self.model, self.folder, self.size, self.written = model, folder, max_shard_size, written
        self.widths: list[Widths] = [widest_widths(model, plan)] if pad_to_widest else []
        for widths in self.widths:
            plan = padded_plan(plan, widths)
        self.widths.append(field_widths(model, plan, any_surplus=pad_to_widest))
        self._sites = survey(model).sites
        self._state: dict[str, Tensor] = model.state_dict()
        self.skeleton = _skeleton(model)
        self._names = frozenset(names_once(model))
        self._left = {name: None for name in self._state if name in self._names}
        self._shards: list[Path] = []
        self._weights: dict[str, int] = {}
        self._bytes = 0

    def write(self, path: str, pruned: Pruned) -> None:
        """Write the weights of the module ``path``, in which all sites of ``pruned`` are, where they are not there."""
        names = [name for name in self._left if name.startswith(f"{path}.")]
        key = "" if self.written is None else _key(path, pruned)
        done = None if self.written is None else self.written.find(path, key)
        self._load(names, read=done is None)
        _cut(self.skeleton, pruned if done is None else plan_of(pruned), self.widths)
        if done is None:
            first = len(self._shards)
            self._save(names)
            if self.written is not None:
                self.written.add(path, key, self._shards[first:])
        else:
            self._take(names, done)
        self._empty(names)
        give_back_free()

    def finish(self) -> dict[str, Any]:
        """Write everything else; return what the config cannot say (see `narrowing`)."""
        changes = config_changes(self.skeleton)
        large = [[name] for name in self._left if self._state[name].numel() > SLICE]
        small = [name for name in self._left if [name] not in large] or large.pop()
        rest: list[Path] = []
        for names in (*large, small):
            self._load(names)
            rest = self._save(names)
            self._empty(names)
            give_back_free()
        for path in rest:
            path.replace(self.folder / path.name)
        (self.folder / PART).rmdir()
        total = len(self._shards)
        for i, path in enumerate(self._shards, 1):
            place = self.folder / _shard(i, total)
            path.rename(place) if path.parent == self.folder else put(path, place)
        index = {
            "metadata": {"total_parameters": self.n_parameters, "total_size": self._bytes},
            "weight_map": {name: _shard(i + 1, total) for name, i in self._weights.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return changes

    @property
    def n_parameters(self) -> int:
        """Parameters of what is written, tied ones once."""
        named = self.skeleton.named_parameters(remove_duplicate=False)
        return sum(p.numel() for name, p in named if name in self._names)

    @property
    def found_widths(self) -> dict[str, int]:
        """Width of each FFN as it is written, by its name."""
        return {site.name: shape_of(self.skeleton, site)[0] for site in self._sites}

    def _load(self, names: Sequence[str], *, read: bool = True) -> None:
        """Put the values of the dense model into the skeleton, or any values where only shapes count."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = self.skeleton.get_submodule(path)
            like = self._state[name]
            value = (
                value_of(self.model, name, like).detach().cpu().clone()
                if read
                else torch.empty_like(like, device="cpu")
            )
            if leaf in dict(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(leaf, value)

    def _save(self, names: Sequence[str]) -> list[Path]:
        """Write some weights; return files beside them that the last call leaves for the checkpoint."""
        part = self.folder / PART
        state = self.skeleton.state_dict()
        whole: Any = self.skeleton
        whole.save_pretrained(part, state_dict={n: state[n] for n in names}, max_shard_size=self.size)
        folder = self.folder if self.written is None else self.written.folder
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(part.glob("*.safetensors"))
        first = len(self._shards)
        places = [folder / f"{first + i}{SUFFIX}" for i in range(len(files))]
        for path, place in zip(files, places, strict=True):
            shutil.move(path, place)
        self._take(names, places)
        (part / INDEX).unlink(missing_ok=True)
        return sorted(part.iterdir())

    def _take(self, names: Sequence[str], files: Sequence[Path]) -> None:
        """Count shards that hold these weights."""
        for name in names:
            del self._left[name]
        for path in files:
            keys, size = _contents(path)
            self._weights |= dict.fromkeys(keys, len(self._shards))
            self._bytes += size
            self._shards.append(path)

    def _empty(self, names: Sequence[str]) -> None:
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = self.skeleton.get_submodule(path)
            own = dict(module.named_parameters(recurse=False))
            if leaf in own:
                setattr(module, leaf, nn.Parameter(own[leaf].to("meta"), requires_grad=False))


def _cut(skeleton: nn.Module, pruned: Pruned, widths: Sequence[Widths]) -> None:
    if isinstance(pruned, Reconstruction):
        rewrite_(skeleton, pruned)
    plan = plan_of(pruned)
    if plan.kept:
        for one in widths:
            plan = pad_(skeleton, plan, {site: one[site] for site in plan.kept if site in one})
        slice_shapes_(skeleton, plan)


def _key(path: str, pruned: Pruned) -> str:
    """Hash of what a block is made of, beside the dense model."""
    new = hash_tensors(pruned.tensors.items()) if isinstance(pruned, Reconstruction) else None
    return hash_json([path, plan_to_dict(plan_of(pruned)), new])


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy without weights and without hooks."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    memo |= {id(hook): hook for m in model.modules() if (hook := getattr(m, "_hf_hook", None)) is not None}
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        for name in ("_hf_hook", "_old_forward", "forward", "hf_device_map"):
            vars(module).pop(name, None)
    return made


def _shard(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _contents(path: Path) -> tuple[list[str], int]:
    """Names of the tensors in a file, and their bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return [name for name in header if name != "__metadata__"], path.stat().st_size - 8 - length
