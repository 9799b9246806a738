"""Run the decoder blocks of a model one at a time, on hidden states that are kept between them.

What a block is called with beside the hidden states (positions, masks) does not depend on what the blocks before it
compute. So one forward in which every block passes its input on, and which ends at the last block, brings it for all
blocks. Whether a model is such a chain is not assumed: a piece of text is run both ways, and a model that gives
anything else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.heap import give_back_free
from ffnscope.ffn.offload import resident
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.streamed import is_streamed
from ffnscope.ffn.vocabulary import held_embedding, sliced_head
from ffnscope.types import FFNSite

_PIECE = (2, 64)  # windows and tokens of the text that both ways are compared on
# largest difference of the two ways, as a share of the largest value: they compute the same, but kernels may differ
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 0.02  # bfloat16 and float16
_SAMPLE = 8  # tokens of it that logits are kept of
_REMEMBERED = 8  # tensors of one shape that later ones are compared with


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """What a block is given for one batch beside the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        keyword: name of the argument of the hidden states, or None where they come first.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The decoder blocks of a model, in the order in which they run, ready to be run on some batches of text.

    Attributes:
        model: the model that they are of.
        names: path of each block.
        modules: the blocks.
        lengths: of the tuple that each block returns, or 0.
        batches: the text.
        sample: of a few tokens, the hidden states behind the last block [k, d_model] and the model's logits [k, vocab].
        calls: per batch what each block is called with. What is equal for several blocks or batches is held once:
            without padding positions and masks take the memory of one batch, with padding one mask per batch.
    """

    model: nn.Module
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    lengths: tuple[int, ...]
    batches: tuple[Windows, ...]
    sample: tuple[Tensor, Tensor]
    calls: tuple[tuple[BlockCall, ...], ...]

    def held(self, block: int) -> contextlib.AbstractContextManager[None]:
        """Within the context, the offloaded weights of a block are in memory: read once, for however many runs."""
        return resident(self.model, self.modules[block])

    def run(self, block: int, batch: int, hidden: Tensor) -> Tensor:
        """Hidden states [b, T, d_model] after a block, from those before it.

        Offloaded weights come and go as usual, unless the block is `held`.
        """
        call = self.calls[batch][block]
        if call.keyword is None:
            output = self.modules[block](hidden, *call.args, **call.kwargs)
        else:
            output = self.modules[block](*call.args, **{call.keyword: hidden}, **call.kwargs)
        return _first(output)

    def sites_of(self, sites: Sequence[FFNSite]) -> list[list[FFNSite]]:
        """The sites in each block."""
        return [[s for s in sites if f"{s.path}.".startswith(f"{name}.")] for name in self.names]


def open_blocks(model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Windows]) -> tuple[Blocks, list[Tensor]]:
    """Return the blocks of the list that holds ``sites``, and per batch the hidden states before the first of them.

    The model must be `frozen`. Nothing made here needs a gradient; run a block with gradients enabled to have one.
    Memory: the hidden states of all batches once, [b, T, d_model] each in the model's dtype, on the device that made
    them; whoever replaces them by those after a block keeps it at that. Positions and masks: see `Blocks`.

    Raises:
        UsageError: no batch or no site.
        NotAvailableError: the blocks are no chain: the FFNs are in several lists or in none, a block runs several
            times, blocks hand on more than hidden states, or something between them changes these.
        NonFiniteError: hidden states are NaN or infinite on the first text; the block is named.
    """
    starts: list[Tensor] = []
    return trace_blocks(model, sites, batches, starts.append), starts


def trace_blocks(
    model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Windows], on_start: Callable[[Tensor], None]
) -> Blocks:
    """`open_blocks`, which gives away the hidden states before the first block, batch by batch, and keeps none."""
    if not batches or not sites:
        raise UsageError("running blocks one at a time needs at least one window of text and one FFN.")
    names, modules = list_of_blocks(model, sites)
    with torch.no_grad(), held_embedding(model), sliced_head(model, modules):
        piece = batches[0][: _PIECE[0]].cut(_PIECE[1])
        lengths, sample = _check(model, names, modules, piece)
        calls: list[tuple[BlockCall, ...]] = []
        shared = _Shared()
        for batch in batches:
            hidden, row = _passed_on(model, modules, lengths, batch)
            on_start(hidden)
            calls.append(tuple(shared.call(one) for one in row))
            shared.end_batch()
    return Blocks(model, tuple(names), tuple(modules), lengths, tuple(batches), sample, tuple(calls))


def list_of_blocks(model: nn.Module, sites: Sequence[FFNSite]) -> tuple[tuple[str, ...], tuple[nn.Module, ...]]:
    """Paths and modules of the list of decoder blocks that holds ``sites``.

    Raises:
        NotAvailableError: they are in several lists, or in none.
    """
    paths = [layer_path(site.path) for site in sites]
    alone = next((s.name for s, path in zip(sites, paths, strict=True) if path is None), None)
    if alone is not None:
        raise _no_chain(model, f"{alone} is in no list of blocks")
    lists = sorted({(path or "").rpartition(".")[0] for path in paths})
    if len(lists) > 1:
        raise _no_chain(model, f"its FFNs are in several lists of blocks ({', '.join(lists)})")
    children = dict(model.get_submodule(lists[0]).named_children())
    return tuple(f"{lists[0]}.{name}" for name in children), tuple(children.values())


def _no_chain(model: nn.Module, why: str) -> NotAvailableError:
    return NotAvailableError(
        f"{type(model).__name__} cannot be run block by block: {why}. Expected one list of blocks that hand on nothing "
        "but hidden states [batch, T, d_model]. Use a method that runs the whole model, such as one-shot "
        "reconstruction."
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """A block in a true forward: hidden states before and after, and the length of the tuple that it returned (or 0).

    The index is that in the list of blocks.
    """

    block: int
    before: Tensor | None
    after: Any
    length: int


def _check(
    model: nn.Module, names: Sequence[str], modules: Sequence[nn.Module], piece: Windows
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor]]:
    """Raise unless single blocks give what the model gives; return `Blocks.lengths` and `Blocks.sample`."""
    seen, logits = _true_forward(model, modules, piece)
    if [one.block for one in seen] != list(range(len(modules))):
        ran = ", ".join(names[one.block] for one in seen[:4])
        raise _no_chain(model, f"its {len(modules)} blocks do not run once each and in order ({ran}, ...)")
    shape = piece.input_ids.shape
    for one in seen:
        for value in (one.before, one.after):
            if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[:2] != shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise _no_chain(model, f"{names[one.block]} works on {found} for a batch of {tuple(shape)}")
    lengths = tuple(one.length for one in seen)
    try:
        hidden, calls = _passed_on(model, modules, lengths, piece)
    except (TypeError, AttributeError) as error:  # of code between the blocks
        raise _no_chain(
            model, f"what a block returns beside the hidden states is needed by the next ({error})"
        ) from error
    few = piece.valid[0].nonzero().flatten()[:_SAMPLE]
    sample = seen[-1].after[0][few.to(seen[-1].after.device)], logits[0][few.to(logits.device)]
    blocks = Blocks(model, tuple(names), tuple(modules), lengths, (piece,), sample, (calls,))
    valid = piece.valid.to(hidden.device)
    for block, one in enumerate(seen):
        if not bool(torch.isfinite(one.after[valid.to(one.after.device)]).all()):
            raise NonFiniteError(
                f"what {names[block]} puts out is NaN or infinite. In float16 this is usually an overflow: load the "
                "model in bfloat16 or float32 (model.dtype); otherwise look for NaN in the checkpoint."
            )
        with blocks.held(block):
            twice = [blocks.run(block, 0, hidden) for _ in range(2)]
        if not all(same_values(one.after, found, valid) for found in twice):
            raise _no_chain(
                model,
                f"{names[block]} alone gives other hidden states than within the model, so it reads or keeps something "
                "that earlier blocks made",
            )
        hidden = twice[0]
    return lengths, sample


def same_values(wanted: Tensor, found: Tensor, valid: Tensor) -> bool:
    """Whether two ways to compute something agree on all valid tokens, up to rounding."""
    mask = valid.to(wanted.device)
    first, second = wanted[mask].double(), found.to(wanted.device)[mask].double()
    return bool((first - second).abs().max() <= _ROUNDING.get(wanted.dtype, _COARSE) * first.abs().max())


def _true_forward(model: nn.Module, modules: Sequence[nn.Module], piece: Windows) -> tuple[list[_Seen], Tensor]:
    seen: list[_Seen] = []
    begun: list[Tensor | None] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, _ = _split(args, kwargs)
        begun.append(None if hidden is None else hidden.clone())

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        block = next(i for i, one in enumerate(modules) if one is module)
        first = _first(output)
        after = first.clone() if isinstance(first, Tensor) else first
        seen.append(_Seen(block, begun.pop(), after, len(output) if isinstance(output, tuple | list) else 0))
        if is_streamed(model):
            give_back_free()

    handles: list[Any] = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end))
        logits = forward_logits(model, piece)
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


class _EndOfBlocks(BaseException):
    """Leaves a forward at its last block; no Exception, so that no model catches it."""


def _passed_on(
    model: nn.Module, modules: Sequence[nn.Module], lengths: Sequence[int], batch: Windows
) -> tuple[Tensor, tuple[BlockCall, ...]]:
    """Hidden states before the first block, and what each block is called with when all pass on what they are given."""
    found: list[tuple[Tensor, BlockCall]] = []

    def last(hidden: Tensor) -> Tensor:
        raise _EndOfBlocks

    with passing_on(modules, lengths, last, found), contextlib.suppress(_EndOfBlocks):
        forward_logits(model, batch)
    return found[0][0], tuple(call for _, call in found)


@contextlib.contextmanager
def passing_on(
    modules: Sequence[nn.Module],
    lengths: Sequence[int],
    last: Callable[[Tensor], Tensor],
    found: list[tuple[Tensor, BlockCall]] | None = None,
) -> Generator[None]:
    """Within the context, decoder blocks return their input, and the last one ``last(input)``.

    Args:
        modules: the blocks.
        lengths: of the tuple that each returns, or 0.
        last: what the last block does.
        found: takes what each block is called with.
    """

    def passing(block: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            assert hidden is not None, "the model was checked"
            if found is not None:
                found.append((hidden, call))
            hidden = last(hidden) if block == len(modules) - 1 else hidden
            return (hidden, *(None,) * (lengths[block] - 1)) if lengths[block] else hidden

        return forward

    before = [vars(module).get("forward") for module in modules]
    try:
        for block, module in enumerate(modules):
            module.forward = passing(block)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if old is not None:
                module.forward = old


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, BlockCall]:
    """The hidden states among the arguments of a block, and the others."""
    if args:
        return (args[0] if isinstance(args[0], Tensor) else None), BlockCall(args[1:], dict(kwargs), None)
    name = next((n for n, value in kwargs.items() if isinstance(value, Tensor)), None)
    others = {n: value for n, value in kwargs.items() if n != name}
    return (None if name is None else kwargs[name]), BlockCall((), others, name)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else cast("Any", output)


class _Shared:
    """Puts one tensor in the place of equal ones, in what blocks of several batches are called with."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}
        self._here: dict[int, tuple[Tensor, Tensor]] = {}

    def call(self, call: BlockCall) -> BlockCall:
        args = tuple(self._value(value) for value in call.args)
        return BlockCall(args, {name: self._value(value) for name, value in call.kwargs.items()}, call.keyword)

    def end_batch(self) -> None:
        """Forget which tensors of this batch were seen to equal which."""
        self._here.clear()

    def _value(self, value: Any) -> Any:
        if type(value) is tuple:
            return tuple(self._value(part) for part in cast("tuple[Any, ...]", value))
        return self._tensor(value) if isinstance(value, Tensor) else value

    def _tensor(self, value: Tensor) -> Tensor:
        if id(value) not in self._here:  # held beside its twin, so that no other tensor takes its place in memory
            known = self._known.setdefault((value.shape, value.dtype, value.device), [])
            twin = next((one for one in known if torch.equal(one, value)), value)
            if twin is value and len(known) < _REMEMBERED:
                known.append(value)
            self._here[id(value)] = value, twin
        return self._here[id(value)][1]
