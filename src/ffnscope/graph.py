"""The decoder as a directed acyclic graph: what a metric of scope "model" receives instead of a model.

Nodes are the residual channels at every cut (before, between and after the steps), the channels of every FFN, and the
value channels of every attention. Edges are the entries of weight matrices, which are read when they are asked for, one
matrix at a time; skip edges (a residual channel to itself at the next cut) have no weight. Nothing here knows a model:
`ffnscope.ffn.graph.decoder_graph` makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.types import FFNSite, ObservedSite


def _none() -> None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight [n_out, n_in] that is read when it is asked for.

    Attributes:
        name: path of the weight in the model.
        shape: (n_out, n_in).
        open: makes a context in which the weight is in memory, also one that is offloaded. `read` checks the shape.
        bias: reads the bias [n_out] that is added to its product, or None where there is none. It is no edge.
    """

    name: str
    shape: tuple[int, int]
    open: Callable[[], AbstractContextManager[Tensor]]
    bias: Callable[[], Tensor | None] = _none

    @contextmanager
    def read(self) -> Generator[Tensor]:
        """Within the block, the weight [n_out, n_in] in its own dtype and on the device that computes with it.

        A view: do not change it, and do not keep it.
        """
        with self.open() as weight:
            if tuple(weight.shape) != self.shape:
                raise UsageError(f"{self.name} has shape {tuple(weight.shape)}; the graph expects {self.shape}.")
            yield weight


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """An FFN, an expert or an attention: it reads the residual cut before its step, and writes to the cut after it.

    Attributes:
        site: where it is; its channels are nodes. An `ObservedSite` for an attention, which is not scored.
        up: edges from residual channels to channels, [d_ff, d_model]; of an attention, the rows of the value
            projection, [n_values, d_model].
        down: edges from channels to residual channels, [d_model, d_ff].
        gate: the second edge from each residual channel to each channel, or None for a plain FFN.
        sources: of an attention, the row of ``up`` that each channel passes on, [d_ff] int64: several channels share a
            row where heads share their values. The mixing of tokens is left out.
        norm: weight [d_model] of the norm through which it reads the stream, or None.
        out_norm: weight [d_model] of the norm through which it writes to the stream, or None.
        gain: number by which its output is multiplied before it is added to the stream.
    """

    site: FFNSite
    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    sources: Tensor | None = None
    norm: Tensor | None = None
    out_norm: Tensor | None = None
    gain: float = 1.0

    @property
    def readers(self) -> tuple[Matrix, ...]:
        """Matrices from the residual stream to the channels: gate, if any, and up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def is_ffn(self) -> bool:
        """Whether its channels are scored."""
        return self.site.role == "ffn"


@dataclass(frozen=True, slots=True, eq=False)
class DecoderGraph:
    """Residual cuts with the branches between them.

    Attributes:
        d_model: residual channels of each cut.
        steps: the branches between each cut and the next, in the order of the model: all branches of a step read the
            same cut and write to the same one, as the experts of a layer do. Cut 0 is the embedding, and cut
            ``len(steps)`` the stream that the unembedding reads.
        cuts: the site whose statistics tell the size of each cut, ``len(steps) + 1`` of them; None where it was not
            found. Empty: none is known.
        head: the unembedding [vocabulary, d_model], or None.
        head_site: the site whose statistics tell the size of what the unembedding reads.
        head_norm: weight [d_model] of the norm before the unembedding, or None.
        missing: what the model has and the graph lacks, by name and with the reason.
    """

    d_model: int
    steps: tuple[tuple[Branch, ...], ...]
    cuts: tuple[ObservedSite | None, ...] = ()
    head: Matrix | None = None
    head_site: ObservedSite | None = None
    head_norm: Tensor | None = None
    missing: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.cuts and len(self.cuts) != len(self.steps) + 1:
            raise UsageError(f"a graph of {len(self.steps)} steps has one cut more; got {len(self.cuts)}.")
        for branch in self.branches:
            width, stream = branch.site.d_ff, branch.site.d_model
            rows = width if branch.sources is None else branch.up.shape[0]
            shapes = {m.name: (m.shape, (rows, stream)) for m in branch.readers}
            shapes[branch.down.name] = (branch.down.shape, (stream, width))
            for name, (found, expected) in shapes.items():
                if found != expected or stream != self.d_model:
                    raise UsageError(
                        f"{name} of {branch.site.name} has shape {found}; expected {expected} in a graph of "
                        f"{self.d_model} residual channels."
                    )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in the order of the model."""
        return tuple(branch for step in self.steps for branch in step)

    @property
    def ffns(self) -> tuple[Branch, ...]:
        """The branches whose channels are scored, in the order of the model."""
        return tuple(branch for branch in self.branches if branch.is_ffn)

    @property
    def sites(self) -> tuple[FFNSite, ...]:
        """The FFNs of the graph, in the order of the model."""
        return tuple(branch.site for branch in self.ffns)

    @property
    def observed(self) -> tuple[ObservedSite, ...]:
        """What is observed beside the FFNs: cuts, attentions, unembedding."""
        attentions = [b.site for b in self.branches if isinstance(b.site, ObservedSite)]
        return tuple(site for site in (*self.cuts, *attentions, self.head_site) if site is not None)
