"""Several processes, each with the whole model, that share the windows of a text: one leads, the others serve it.

The processes are started by torchrun or ``accelerate launch``. The leader (rank 0) does everything; where it comes to a
pass over text, it tells the others, which load the same model, take their share of the batches and send back sums. So
nothing else of a computation has to know of them, and only the leader writes files. Whether the others have the same
model is compared before every pass (`identity_of`); one that the leader has changed since, or did not load from a
source, it runs alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import starmap
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ffnscope.calibrate.identity import Identity, identity_of
from ffnscope.errors import FFNScopeError, UsageError
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model, source_of
from ffnscope.registry import import_own, own_modules

_PATIENCE = timedelta(days=30)  # the leader may compute for long between two passes
_FAREWELL = 30.0  # seconds that the leader waits for others that are not there to hear its end


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share a pass; alone where ``size`` is 1."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether results come together here."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agreed(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` in every process; where one raises, raise that in all of them, so that none waits in vain."""
        error: FFNScopeError | None = None
        value: Any = None
        try:
            value = make()
        except FFNScopeError as raised:
            if self.size == 1:
                raise
            error = raised
        found = next((one for one in self.gathered(error) if one is not None), None)
        if found is not None:
            raise found
        return value

    def reduced(self, value: Tensor, how: str) -> Tensor:
        """Reduce a tensor of all processes to the leader's; what the others get is of no use."""
        there = value.cpu().contiguous()
        dist.reduce(there, 0, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return there


ALONE = Ranks()
_STATE = {"leads": False}


@contextlib.contextmanager
def shared_windows() -> Generator[bool]:
    """Let the processes that torchrun or ``accelerate launch`` has started share the windows of every pass.

    Yields True in the leader, in which `calibrate`, `perplexity` and `compare_plans` then split their batches over all
    processes, for models from `load_model`. In the others, it first serves the leader until that leaves the block, and
    then yields False: write ``with shared_windows() as leads:`` and do nothing there unless ``leads``. Started as a
    single process, it yields True and changes nothing.

    Statistics are sums and maxima, so only the order of additions differs from a single process.

    Raises:
        UsageError: the variables of the launcher are incomplete.
    """
    size = _integer("WORLD_SIZE", 1)
    if size == 1:
        yield True
        return
    rank = _integer("RANK", None)
    if torch.cuda.is_available():
        torch.cuda.set_device(_integer("LOCAL_RANK", rank) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=_PATIENCE)
    if rank != 0:
        _serve()
        yield False
        return
    _STATE["leads"] = True
    try:
        yield True
    finally:
        _STATE["leads"] = False
        _dismiss()


def n_processes() -> int:
    """How many processes share the windows that this one asks for; 1 in those that serve."""
    return dist.get_world_size() if _STATE["leads"] else 1


def n_processes_here() -> int:
    """How many of `n_processes` are on this machine, as the launcher says (LOCAL_WORLD_SIZE)."""
    return min(n_processes(), _integer("LOCAL_WORLD_SIZE", n_processes()))


def _dismiss() -> None:
    """Tell the others to end, in a thread: after an interrupt they may be within a pass, and not listen."""
    told = threading.Thread(target=dist.broadcast_object_list, args=([None],), daemon=True)
    told.start()
    told.join(_FAREWELL)
    if not told.is_alive():
        dist.destroy_process_group()


def shared(model: nn.Module, serve: Callable[..., None], *arguments: Any) -> Ranks:
    """Ask all processes to take part in a pass; return this one's place among them, or `ALONE`.

    Every other process calls ``serve(its model, place, *arguments)``, a function of a module, in which the calls of
    `Ranks` must be those that the leader makes. Where there are others, a `UserWarning` tells why a pass is not shared.
    """
    if not _STATE["leads"]:
        return ALONE
    source = source_of(model)
    if source is None:
        _tell_alone("the others cannot load this model, which is not one from load_model")
        return ALONE
    place = Ranks(0, dist.get_world_size())
    dist.broadcast_object_list([(serve, source, own_modules(), arguments)])
    return place if _alike(place, partial(identity_of, model)) else ALONE


def _serve() -> None:
    """Take part in what the leader asks for, until it ends."""
    place = Ranks(dist.get_rank(), dist.get_world_size())
    known: dict[str, LoadedModel] = {}
    while True:
        message: list[Any] = [None]
        dist.broadcast_object_list(message)
        if message[0] is None:
            dist.destroy_process_group()
            return
        serve, source, modules, arguments = message[0]
        if _alike(place, partial(_loaded_identity, known, source, modules)):
            with contextlib.suppress(FFNScopeError):  # the leader raises it too
                serve(known[repr(source)].model, place, *arguments)


def _loaded_identity(known: dict[str, LoadedModel], source: ModelSource, modules: Sequence[str]) -> Identity:
    """Load the model of a source, once, and look at it."""
    for name in modules:
        import_own(name)
    if repr(source) not in known:
        known.clear()
        known[repr(source)] = load_model(source)
    return identity_of(known[repr(source)].model)


def _alike(place: Ranks, look: Callable[[], Identity]) -> bool:
    """Whether all processes have the leader's model; all look at theirs at the same time.

    Where another process cannot load it, the leader goes on alone; what it cannot look at itself, it raises.
    """
    error: FFNScopeError | None = None
    found: Identity | str
    try:
        found = look()
    except FFNScopeError as raised:
        error, found = raised, str(raised)
    first, *others = place.gathered(found)
    if place.leads and error is not None:
        raise error
    if isinstance(first, str):
        return False
    whys = [why for why in starmap(partial(_unlike, first), enumerate(others, 2)) if why is not None]
    if place.leads and whys:
        _tell_alone(whys[0])
    return not whys


def _unlike(first: Identity, number: int, other: Identity | str) -> str | None:
    """Why a process does not take part; None where it does."""
    if isinstance(other, str):
        return f"process {number} cannot load the model: {other}"
    found = first.difference(other)
    return found and (
        f"the model of process {number} has {found}: the first process has changed its own since it was loaded "
        "(a mask, pruning, a patch), or their files or machines differ"
    )


def _tell_alone(why: str) -> None:
    message = f"one of {n_processes()} processes computes a pass alone, which is slower, and right: {why}."
    warnings.warn(message, stacklevel=2)


def _integer(variable: str, default: int | None) -> int:
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UsageError(
            f"the environment variable {variable} should hold a number, as torchrun and `accelerate launch` set it; "
            f"found {text!r}. Start ffnscope by one of them, or remove WORLD_SIZE."
        )
    return int(text)
