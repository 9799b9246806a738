"""A plan with new weights or a bias for what stays: data that is made once, saved, and applied later."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.columns import column_edit
from ffnscope.apply.edits import Edit, applied
from ffnscope.apply.export import check_prunable, cut_
from ffnscope.apply.folder import refuse_existing
from ffnscope.apply.mask import check_plan, removals
from ffnscope.apply.new_bias import add_bias_, bias_switch, remove_bias_, switch_on_, without_bias
from ffnscope.apply.profile import error_profile, reconstruction_name
from ffnscope.apply.rows import ChannelRows, row_edits
from ffnscope.errors import NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.expert_calls import stored_together
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import down_bias, down_projection
from ffnscope.io import complete, expect_kind, plan_from_dict, plan_to_dict, read_tensors, write_tensors
from ffnscope.types import FFNSite, PruningPlan

KIND = "reconstruction"


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """What is removed, and how the rest makes up for it.

    Attributes:
        plan: which channels stay.
        down: site -> new columns of its kept channels [d_model, k], in the order of the plan; other sites keep theirs.
        bias: site -> what is added to the output of the FFN [d_model], beside a bias that it has.
        facts: how it was made; ``trained`` is True where weights were trained.
        rows: site -> new rows of gate and up of its kept channels, where they were trained.
    """

    plan: PruningPlan
    down: Mapping[FFNSite, Tensor]
    bias: Mapping[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rows: Mapping[FFNSite, ChannelRows] = field(default_factory=dict[FFNSite, ChannelRows])

    def __post_init__(self) -> None:
        for what, values in (("down", self.down), ("bias", self.bias)):
            for site, value in values.items():
                if site not in self.plan.kept:
                    raise UsageError(f"reconstruction: {what} is given for {site.name}, which is not in the plan.")
                shape = (site.d_model, self.plan.kept[site].numel()) if what == "down" else (site.d_model,)
                if tuple(value.shape) != shape:
                    raise UsageError(
                        f"reconstruction of {site.name}: expected {what} {shape}, got {tuple(value.shape)}."
                    )
                if not bool(torch.isfinite(value).all()):
                    raise NonFiniteError(f"reconstruction of {site.name}: {what} holds NaN or infinity.")
        self._check_rows()

    def _check_rows(self) -> None:
        for site, rows in self.rows.items():
            if site not in self.plan.kept:
                raise UsageError(f"reconstruction: rows are given for {site.name}, which is not in the plan.")
            if site.stacked:
                raise UsageError(f"reconstruction: rows are given for {site.name}, an expert in shared parameters.")
            wrong = rows.misshapen(site, self.plan.kept[site].numel())
            if wrong is not None:
                raise UsageError(f"reconstruction of {site.name}: {wrong}.")
            if not all(bool(torch.isfinite(value).all()) for value in rows.tensors.values()):
                raise NonFiniteError(f"reconstruction of {site.name}: rows hold NaN or infinity.")

    @property
    def sites(self) -> tuple[FFNSite, ...]:
        """Sites that get new columns, rows or a bias."""
        return tuple(s for s in self.plan.kept if s in self.down or s in self.bias or s in self.rows)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every new weight by what it is and of which site, as in a file: ``down/model.layers.0.mlp``."""
        parts: dict[str, Tensor] = {f"down/{site.name}": value for site, value in self.down.items()}
        parts |= {f"bias/{site.name}": value for site, value in self.bias.items()}
        rows = ((site, name, value) for site, one in self.rows.items() for name, value in one.tensors.items())
        return parts | {f"{name}/{site.name}": value for site, name, value in rows}

    @property
    def name(self) -> str:
        """The kind of reconstruction in a few words, for tables."""
        return reconstruction_name(self.facts)

    @property
    def told_plan(self) -> PruningPlan:
        """The plan, with the facts of the reconstruction in its provenance: what a checkpoint tells."""
        return replace(self.plan, provenance={**self.plan.provenance, "reconstruction": dict(self.facts)})

    def error_profile(self) -> list[dict[str, Any]]:
        """Where the damage is; see `ffnscope.apply.profile.error_profile`."""
        return error_profile(self.plan, self.facts)


def check_linear(sites: Sequence[FFNSite]) -> None:
    """Raise NotAvailableError unless the output of each of these FFNs is linear in its channels, and used once."""
    for site in sites:
        if site.norm is not None:
            why = f"a norm ({site.norm}) stands before its down projection, so its output is not linear"
        elif site.twins:
            why = f"{1 + len(site.twins)} layers share its parameters (also {site.twins[0]}), each with its own outputs"
        else:
            continue
        raise NotAvailableError(
            f"{site.name} cannot be reconstructed: {why}. Prune without reconstruction, or leave it out of the plan "
            "(model.tracked_layers, --tracked)."
        )


@contextlib.contextmanager
def reconstructed(model: nn.Module, reconstruction: Reconstruction) -> Generator[nn.Module]:
    """Within the block, removed channels are masked and the others have their new columns, rows and biases.

    The logits are those of the model after `reconstruct_`. On exit the model is bit-identical, also after an exception
    or Ctrl-C. Offloaded weights are changed whenever they are read. A down projection without a bias has one within
    the block. Contexts nest with `masked`.

    Raises:
        UsageError: the plan was made for a model of other shapes.
        ModelError: a weight is on the meta device without a value.
        NotAvailableError: see `check_linear`; or a bias for experts in shared parameters or an offloaded weight that
            have none.
    """
    check_plan(model, reconstruction.plan)
    check_linear(reconstruction.sites)
    added = [down_projection(model, site) for site in without_bias(model, list(reconstruction.bias))]
    try:
        for module in added:
            add_bias_(module)
        changes = chain.from_iterable(_edits(model, reconstruction, reconstruction.sites))
        with applied(model, [*removals(model, reconstruction.plan), *changes]):
            yield model
    finally:
        for module in added:
            remove_bias_(module)


def reconstruct_(model: nn.Module, reconstruction: Reconstruction, *, pad_to_widest: bool = False) -> nn.Module:
    """Write the new weights, remove the other channels for good as `prune_` does, in place; return the model.

    A down projection without a bias is given one where a field of the config can say so (``mlp_bias`` of the Llama
    family; biases of gate and up, which come with it, are zero), so that plain `transformers` loads what is saved.

    Raises:
        UsageError: the plan was made for a model of other shapes.
        ModelError: a weight is on the meta device without a value.
        NonFiniteError: a weight holds NaN or infinity.
        LayoutError: cutting would compute something else than masking.
        NotAvailableError: see `reconstructed`; or a bias that no field of the config gives. In all these cases the
            model is unchanged.
    """
    check_linear(reconstruction.sites)
    check_plan(model, reconstruction.plan)
    new = without_bias(model, list(reconstruction.bias))
    switch = bias_switch(model, new) if new else None
    check_prunable(model, reconstruction.plan)
    if switch is not None:
        switch_on_(model, switch)
    rewrite_(model, reconstruction)
    return cut_(model, reconstruction.plan, pad_to_widest=pad_to_widest)


def rewrite_(model: nn.Module, reconstruction: Reconstruction) -> None:
    """Write the new columns, rows and biases into a model, in place; every FFN that is given a bias has one."""
    for sites in stored_together(reconstruction.sites):
        with materialised(model, sites[0], write=True):
            for edit in chain.from_iterable(_edits(model, reconstruction, sites)):
                edit.write(edit.entry.parameter)


def part_of(reconstruction: Reconstruction, sites: Sequence[FFNSite]) -> Reconstruction:
    """The same of some sites only, without facts."""
    whole = reconstruction
    plan = replace(whole.plan, kept={s: whole.plan.kept[s] for s in sites}, protected={}, provenance={})
    down, bias = ({s: of[s] for s in sites if s in of} for of in (whole.down, whole.bias))
    return Reconstruction(plan, down, bias, {}, {s: whole.rows[s] for s in sites if s in whole.rows})


def _edits(model: nn.Module, reconstruction: Reconstruction, sites: Sequence[FFNSite]) -> Iterator[list[Edit]]:
    """New columns, rows and biases of some sites, each of which has a bias where it is given one."""
    for site in sites:
        edits: list[Edit] = []
        if site in reconstruction.down:
            edits.append(column_edit(model, site, reconstruction.plan.kept[site], reconstruction.down[site]))
        if site in reconstruction.rows:
            edits += row_edits(model, site, reconstruction.plan.kept[site], reconstruction.rows[site])
        bias = down_bias(model, site) if site in reconstruction.bias else None
        if bias is not None:
            edits.append(Edit(bias, reconstruction.bias[site], adds=True))
        yield edits


def write_reconstruction(path: Path, reconstruction: Reconstruction, overwrite: bool = False) -> None:
    """Save a reconstruction as safetensors, with its plan and facts in the header.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
    """
    refuse_existing(path, overwrite)
    facts = {"plan": plan_to_dict(reconstruction.plan), "facts": dict(reconstruction.facts)}
    write_tensors(path, reconstruction.tensors, {"kind": KIND, **facts})


def read_reconstruction(path: Path) -> Reconstruction:
    """Load what `write_reconstruction` wrote; raises ArtifactError for any other file."""
    tensors, facts = read_tensors(path)
    expect_kind(path, facts, KIND)
    with complete(path, KIND):
        plan = plan_from_dict(path, facts["plan"])
        down, bias = (
            {site: tensors[f"{what}/{site.name}"] for site in plan.kept if f"{what}/{site.name}" in tensors}
            for what in ("down", "bias")
        )
        rows = {site: one for site in plan.kept if (one := ChannelRows.of(tensors, site)) is not None}
        return Reconstruction(plan, down, bias, facts["facts"], rows)
