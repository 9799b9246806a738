"""`SparsityCard`: a calibrated contextual sparsity of a model, with what it was seen to do and what is promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import weights_hash
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.certificate import Certificate
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.labels import largest, nonzero, top_mass
from ffnscope.sparse.measures import Label
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import Predictor
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.selector import Selector
from ffnscope.types import FFNSite

Source = Literal["calibrate", "test", "second"]
"""What was measured on: documents of the calibration, others of the same text, or another text."""
Band = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """A measure.

    Attributes:
        mean: over tokens.
        stderr: standard error of the mean over documents; None for one document.
        p5: value that 5 % of the tokens are at or below; of documents, where the figure is of several FFNs.
        p95: the same for 95 %.
    """

    mean: float
    stderr: float | None
    p5: float
    p95: float


@dataclass(frozen=True, slots=True)
class LossChange:
    """What selecting in all FFNs at once does to the loss on some windows.

    Attributes:
        dense: perplexity of the dense model.
        sparse: perplexity with the selections, prompts included.
        difference: of the mean NLL, nats per token.
        stderr: of the difference, over documents; None for one document.
        n_documents: of the windows.
        n_targets: predicted tokens.
    """

    dense: float
    sparse: float
    difference: float
    stderr: float | None
    n_documents: int
    n_targets: int


def target_words(measure: str, value: float) -> str:
    """A target (`SparsityCard.target`) in words."""
    if measure in ("perplexity", "bytes"):
        return f"perplexity +{value:.2%}" if measure == "perplexity" else f"bytes {value:.1%} of the dense FFNs"
    return f"{measure.replace('_', ' ')} {value:g}"


@dataclass(frozen=True, slots=True)
class WantedChannels:
    """The channels of a token that should be kept, against which recall and precision are measured.

    Attributes:
        kind: "top_mass", the fewest that hold 1 - ``share`` of the contributions; "largest", the share ``share`` of
            them; or "nonzero", all that contribute anything (``share`` is not used).
        share: see there.
    """

    kind: Literal["top_mass", "largest", "nonzero"] = "top_mass"
    share: float = 0.1

    def __post_init__(self) -> None:
        self.label(torch.ones(1, 1))  # refuses what is impossible

    @property
    def label(self) -> Label:
        """Contributions [T, d_ff] -> mask."""
        made: dict[str, Label] = {
            "top_mass": lambda c: top_mass(c, self.share),
            "largest": lambda c: largest(c, self.share),
            "nonzero": nonzero,
        }
        if self.kind not in made:
            raise UsageError(f"wanted channels are one of {', '.join(made)}; got {self.kind!r}.")
        return made[self.kind]


@dataclass(frozen=True, slots=True)
class SiteCard:
    """One FFN.

    Attributes:
        site: which.
        activation: name of its activation function.
        parameter: of the policy; None where the FFN stays dense.
        density: mean share of the kept channels on the calibration documents; 1 where dense.
        bytes_read: per token at that density, the predictor included; of `ffnscope.sparse.costs.UNIT`, whatever the
            model was loaded in.
        bytes_dense: per token where dense, in the same unit.
        break_even: density above which predictor and kept channels are more bytes than the dense FFN.
        bands: "density" and "kept_mass" (share of a token's scores in kept channels) -> p1 and p99 of their running
            means on the calibration documents: what the run-time monitor should see.
        figures: on what -> measure -> figure.
        source: the FFN whose input the predictor reads, where it looks ahead; else None.
    """

    site: FFNSite
    activation: str
    parameter: float | None
    density: float
    bytes_read: float
    bytes_dense: int
    break_even: float
    bands: Mapping[str, Band]
    figures: Mapping[Source, Mapping[str, Figure]]
    source: FFNSite | None = None

    @property
    def dense(self) -> bool:
        """Whether the FFN stays as it is."""
        return self.parameter is None


@dataclass(frozen=True, slots=True, eq=False)
class SparsityCard:
    """Calibrated contextual sparsity: all that is needed to run it, and what is known of it.

    Attributes:
        rule: predictor and policy.
        wanted: channels that recall is about.
        target: measure and value that were asked for.
        sites: FFNs in the order of the model.
        figures: as in `SiteCard`, over all tokens of all FFNs, with documents as the unit.
        loss: on what -> what it does to the loss; empty where no text was given.
        certificate: or None where none was asked for. Its loss is named in ``facts``.
        allocation: how densities were shared out among FFNs, and whether that was accepted.
        tensors: "<site>/predictor/..." and "<site>/policy/...".
        facts: hashes of weights and texts, arguments, version.
    """

    rule: SelectionRule
    wanted: WantedChannels
    target: tuple[str, float]
    sites: tuple[SiteCard, ...]
    figures: Mapping[Source, Mapping[str, Figure]]
    loss: Mapping[Source, LossChange]
    certificate: Certificate | None
    allocation: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    facts: Mapping[str, Any]

    @property
    def bytes_read(self) -> float:
        """Bytes of FFNs and predictors per token, of `ffnscope.sparse.costs.UNIT`."""
        return sum(one.bytes_read for one in self.sites)

    @property
    def bytes_dense(self) -> int:
        """Bytes of the dense FFNs per token, in the same unit."""
        return sum(one.bytes_dense for one in self.sites)

    def check_model(self, model: nn.Module) -> None:
        """Raise ArtifactError unless weights and activations are those of the calibration."""
        found = weights_hash(model)
        if found != self.facts["weights_hash"]:
            raise ArtifactError(
                f"the card was made for weights with the hash {self.facts['weights_hash']}; those of this "
                f"{type(model).__name__} have {found}. Load that model in the same dtype, or calibrate again."
            )
        there = {site.name: site.activation for site in find_sites(model)}
        for site in (one.site for one in self.sites):
            if there.get(site.name) != site.activation:
                raise ArtifactError(
                    f"{site.name} of the card has the activation {site.activation}; this {type(model).__name__} has "
                    f"{there.get(site.name, 'no FFN')} there. Load the model that was calibrated, or calibrate again."
                )

    def selectors(self, model: nn.Module) -> dict[FFNSite, Selector]:
        """The selections of all FFNs that are not dense.

        Raises:
            ArtifactError: another model, or tensors that do not fit.
        """
        self.check_model(model)
        found: dict[FFNSite, Selector] = {}
        for one in self.sites:
            if one.parameter is not None:
                known = self.restored(model, one)
                assert known is not None, "an FFN that is sparse has its predictor in the card"
                found[one.site] = Selector(*known, one.parameter, one.source)
        return found

    def restored(self, model: nn.Module, one: SiteCard) -> tuple[Predictor, Policy] | None:
        """Predictor and policy of an FFN; None for one that stays dense, and whose predictor is not kept.

        Raises:
            ArtifactError: tensors that do not fit.
        """
        if one.dense and not self.rule.trained:
            return None
        prefix = f"{one.site.name}/"
        own = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        if one.dense and not own:  # of a card that was made before these were kept
            return None
        rule = self.rule.own(ahead=one.source is not None)
        return rule.restore(ffn_of(model, one.site, one.activation), own)
