"""Which channels lie on the fast device: the planner, its prediction, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.io import SCHEMA, complete, expect_kind, read_state, write_state
from ffnscope.sparse.placement.machine import Machine
from ffnscope.types import FFNSite

KIND = "channel placement"
SpeedKind = Literal["predicted", "simulated", "measured"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, and how they are known.

    Attributes:
        tokens_per_second: when one token is decoded at a time.
        kind: "predicted" from mean frequencies and bandwidths; "simulated" from the selections of single tokens and
            bandwidths; "measured" on two devices.
        n_tokens: over how many tokens; 0 for a prediction.
    """

    tokens_per_second: float
    kind: SpeedKind
    n_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Channels on the fast device; all others are on the slow one.

    Attributes:
        hot: site -> channels [n] int64, ascending.
        channel_bytes: site -> bytes of the rows of one channel.
        budget: bytes that were allowed for hot channels.
        machine: bandwidths and times that the plan was made for.
        predicted: with this placement.
        all_slow: predicted with every channel on the slow device.
        facts: what the frequencies were counted on.
    """

    hot: Mapping[FFNSite, Tensor]
    channel_bytes: Mapping[FFNSite, int]
    budget: int
    machine: Machine
    predicted: Speed
    all_slow: Speed
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for site, index in self.hot.items():
            if index.dtype != torch.int64 or not torch.equal(index, index.unique()):
                raise UsageError(f"hot channels of {site.name} must be ascending int64, each once.")
            if index.numel() and not (int(index[0]) >= 0 and int(index[-1]) < site.d_ff):
                raise UsageError(f"hot channels of {site.name} must be in [0, {site.d_ff}).")
        if self.bytes > self.budget:
            raise UsageError(f"hot channels take {self.bytes:,} bytes; the budget is {self.budget:,}.")

    @property
    def bytes(self) -> int:
        """Bytes of all hot channels."""
        return sum(index.numel() * self.channel_bytes[site] for site, index in self.hot.items())

    def is_hot(self, site: FFNSite) -> Tensor:
        """Whether each channel is hot, [d_ff] of bool."""
        return torch.zeros(site.d_ff, dtype=torch.bool).index_fill_(0, self.hot[site], True)


def channel_bytes(model: nn.Module, site: FFNSite) -> int:
    """Bytes of the rows of gate, up and down that belong to one channel, without biases."""
    weights = weights_of(model, site)
    rows = [m.shape[1] * m.element_size() for m in (weights.gate, weights.up) if m is not None]
    return sum(rows) + weights.down.shape[0] * weights.down.element_size()


def plan_placement(
    frequencies: Mapping[FFNSite, Tensor],
    bytes_of: Mapping[FFNSite, int],
    budget: int,
    machine: Machine,
    facts: Mapping[str, Any] | None = None,
) -> Placement:
    """Put the most frequent channels of all FFNs on the fast device, as many as the budget holds and as pays.

    Moving a channel saves time in proportion to its frequency and its bytes, so frequency is what is saved per byte of
    the budget, and sorting by it solves what PowerInfer (arXiv:2312.12456, section 6) writes as an integer program.
    Of the numbers of channels that the budget allows, the one with the shortest predicted time is taken: more can be
    slower, where the fast device would become the one to wait for, or where the first channel of an FFN costs a
    synchronisation. So a larger budget is never predicted slower, and may stay unused.

    The prediction takes mean bytes per token of both devices, FFN by FFN. The mean over tokens of the maximum, which
    `simulate` takes, is longer; there an FFN is synchronised for the tokens that need both, here for all or none. Of
    equal frequencies the earlier FFN and channel is first.

    Args:
        frequencies: site -> how often each channel is selected per token, [d_ff], in [0, 1].
        bytes_of: site -> bytes of one channel; see `channel_bytes`.
        budget: bytes on the fast device for channels.
        machine: what it is predicted for.
        facts: kept in the result.

    Raises:
        UsageError: no site, a negative budget, or something that is no frequency.
    """
    _check(frequencies, budget)
    sites = list(frequencies)
    values = torch.cat([frequencies[s].double().cpu() for s in sites])
    owner = torch.repeat_interleave(torch.arange(len(sites)), torch.tensor([s.d_ff for s in sites]))
    order = values.argsort(descending=True, stable=True)
    sizes = torch.tensor([bytes_of[s] for s in sites])[owner[order]]
    saved = torch.zeros(len(order), dtype=torch.float64)
    slow = 0.0
    for number, site in enumerate(sites):
        place = (owner[order] == number).nonzero().flatten()
        times = _times(values[order[place]] * bytes_of[site], machine)
        saved[place] = -times.diff()
        slow += float(times[0])
    times = slow - torch.cat([saved.new_zeros(1), saved.cumsum(0)])
    allowed = int((sizes.cumsum(0) <= budget).sum())
    n = int(times[: allowed + 1].argmin())
    start = torch.tensor([0, *[s.d_ff for s in sites]]).cumsum(0)
    chosen = order[:n]
    hot = {s: (chosen[owner[chosen] == i] - start[i]).sort().values for i, s in enumerate(sites)}
    predicted, all_slow = (_speed(float(times[k]), machine) for k in (n, 0))
    known = {s: int(bytes_of[s]) for s in sites}
    return Placement(hot, known, budget, machine, predicted, all_slow, dict(facts or {}))


def _times(expected: Tensor, machine: Machine) -> Tensor:
    """Time of an FFN [d_ff + 1] with its 0, 1, ... most frequent channels hot, from the expected bytes of each."""
    hot = torch.cat([expected.new_zeros(1), expected.cumsum(0)])
    cold = torch.cat([expected.flip(0).cumsum(0).flip(0), expected.new_zeros(1)])
    return machine.seconds(hot, cold)


def _speed(seconds: float, machine: Machine) -> Speed:
    total = seconds + machine.other_seconds
    if total <= 0:
        raise UsageError("no channel is ever selected and nothing else takes time, so there is no speed to predict.")
    return Speed(1 / total, "predicted")


def _check(frequencies: Mapping[FFNSite, Tensor], budget: int) -> None:
    if not frequencies:
        raise UsageError("there are no frequencies; give one tensor [d_ff] per FFN.")
    if budget < 0:
        raise UsageError(f"budget must be 0 or more bytes; got {budget}.")
    for site, one in frequencies.items():
        if one.shape != (site.d_ff,) or not bool(((one >= 0) & (one <= 1)).all()):
            raise UsageError(f"frequencies of {site.name} must be [{site.d_ff}] numbers in [0, 1].")


def write_placement(path: Path, placement: Placement) -> None:
    """Write a placement as JSON."""
    rows = [
        {"site": asdict(site), "name": site.name, "channel_bytes": placement.channel_bytes[site], "hot": index.tolist()}
        for site, index in placement.hot.items()
    ]
    told = {name: asdict(getattr(placement, name)) for name in ("machine", "predicted", "all_slow")}
    facts = {"budget": placement.budget, "bytes": placement.bytes, "facts": placement.facts}
    write_state(path, {"kind": KIND, "schema": SCHEMA, **told, **facts, "sites": rows})


def read_placement(path: Path) -> Placement:
    """Read what `write_placement` wrote.

    Raises:
        ArtifactError: missing, damaged, or of another kind.
        UsageError: what it holds is impossible.
    """
    value = read_state(path)
    expect_kind(path, value, KIND)
    with complete(path, KIND):
        sites = [FFNSite(**row["site"]) for row in value["sites"]]
        hot = {s: torch.tensor(row["hot"], dtype=torch.int64) for s, row in zip(sites, value["sites"], strict=True)}
        sizes = {s: int(row["channel_bytes"]) for s, row in zip(sites, value["sites"], strict=True)}
        predicted, all_slow = Speed(**value["predicted"]), Speed(**value["all_slow"])
        machine = Machine(**value["machine"])
        return Placement(hot, sizes, value["budget"], machine, predicted, all_slow, value["facts"])
