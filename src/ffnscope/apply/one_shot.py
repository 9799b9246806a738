"""Reconstructions from the statistics of one calibration of the dense model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.block_fit import refitted
from ffnscope.apply.held_out import Statistics
from ffnscope.apply.mask import check_plan
from ffnscope.apply.new_bias import without_bias
from ffnscope.apply.reconstruction import Reconstruction, check_linear
from ffnscope.apply.refit import DAMPING, Moments, mean_bias
from ffnscope.errors import UsageError
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.types import FFNSite, PruningPlan

TOKENS_PER_CHANNEL = 4
ROUNDING = 0.02
"""Share of a channel's power by which a part may exceed the whole: two passes in half precision round differently."""


def reconstruct(
    model: nn.Module,
    plan: PruningPlan,
    stats: Statistics,
    *,
    damping: float | None = None,
    held_out: Statistics | None = None,
) -> Reconstruction:
    """Refit the down columns of kept channels to the dense output of their FFN, by least squares (see `refit_down`).

    The model is read, not changed. New columns are in its dtype; sums and solutions in float64. FFNs of which nothing
    is removed, and experts that no token reached, keep their columns. ``facts["sites"]`` tells for each FFN the tokens,
    the damping, and the error of the output without and with the refit: see `refitted`. ``facts["damping"]`` says
    whether held-out tokens chose it, it was given, or it is the default. Memory beside the arguments: that of
    `refit_down` for one FFN, and with ``held_out`` d_ff^2 numbers of 8 bytes more.

    Args:
        model: dense, or as the plan's scores found it.
        plan: what stays.
        stats: with ``h_outer`` (that metrics such as ``obs`` need, or ``collect(model, windows, ["h_outer"])``).
        damping: pull towards the original weights, as a share of the mean power of the kept channels; None for 0.01,
            or the choice of the held-out tokens.
        held_out: ``h_outer`` of a part of the tokens of ``stats`` (see `collect_held_out`). The others are fitted with
            every damping of `DAMPINGS`, and each FFN takes the one with the least error on this part; then all are
            fitted. Where the old columns are better there, they stay. An expert of whose tokens none, or all, are in
            the part is fitted on all of them with 0.01.

    Raises:
        UsageError: statistics that are missing, a damping that cannot be or beside ``held_out``, a held-out part that
            is none, or a plan for a model of other shapes.
        NotAvailableError: see `check_linear`.
        NonFiniteError: sums or weights are not finite.

    Warns:
        UserWarning: FFNs that saw fewer than 4 tokens per channel; least squares then fits noise.
    """
    if damping is not None and held_out is not None:
        raise UsageError("give a damping, or held_out statistics that choose it; not both.")
    sites = _sites(model, plan, stats, "h_outer")
    _warn_of_few(sites, stats)
    down: dict[FFNSite, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    for site in sites:
        with materialised(model, site):
            weight = weights_of(model, site).down
            # float64 does not exist on mps
            dense = weight.to(torch.float64) if weight.device.type != "mps" else weight.cpu().double()
            whole = _moments(site, stats, dense)
            fit, judge = _split(site, whole, held_out, dense)
            new, facts[site.name] = refitted(dense, plan.kept[site], fit, judge, damping, lambda whole=whole: whole)
            down[site] = new.to(weight)
    told = {"method": "least squares, one shot", "damping": _told(damping, held_out), "sites": facts}
    return Reconstruction(plan, down, facts=told)


def compensate_bias(model: nn.Module, plan: PruningPlan, stats: Statistics) -> Reconstruction:
    """Replace the removed channels by their means, as a bias of the FFN; columns stay (FLAP, arXiv:2312.11983).

    Args:
        model: dense, or as the plan's scores found it.
        plan: what stays.
        stats: with ``act_sum`` (that the metric ``flap`` needs).

    Raises:
        UsageError: statistics that are missing, or a plan for a model of other shapes.
        NotAvailableError: see `reconstructed`.
    """
    sites = _sites(model, plan, stats, "act_sum")
    without_bias(model, sites)
    bias: dict[FFNSite, Tensor] = {}
    for site in sites:
        with materialised(model, site):
            down = weights_of(model, site).down
            bias[site] = mean_bias(down, plan.kept[site], stats[site].mean("act_sum").to(down.device)).to(down)
    return Reconstruction(plan, {}, bias, {"method": "means of removed channels as a bias"})


def _told(damping: float | None, held_out: Statistics | None) -> str:
    if held_out is not None:
        return "chosen on held-out tokens"
    return f"{DAMPING:g}, no tokens held out" if damping is None else f"{damping:g}, given"


def _sites(model: nn.Module, plan: PruningPlan, stats: Statistics, name: str) -> list[FFNSite]:
    """Sites of which something is removed, and that have statistics; unreached experts are left out."""
    check_plan(model, plan)
    cut = [site for site, kept in plan.kept.items() if kept.numel() < site.d_ff]
    check_linear(cut)
    for site in cut:
        if site not in stats:
            raise UsageError(f"there are no statistics of {site.name}; calibrate the model that the plan is for.")
        stats[site].total(name)
    return [site for site in cut if site.expert is None or stats[site].counts[name]]


def _moments(site: FFNSite, stats: Statistics, like: Tensor) -> Moments:
    if site not in stats:
        raise UsageError(f"there are no held-out statistics of {site.name}; collect h_outer of the same FFNs.")
    return Moments(stats[site].total("h_outer").to(like), stats[site].counts["h_outer"])


def _split(site: FFNSite, whole: Moments, held_out: Statistics | None, like: Tensor) -> tuple[Moments, Moments | None]:
    """Sums over the tokens to fit, and over those that judge; None where there are not both."""
    judge = None if held_out is None else _moments(site, held_out, like)
    if judge is None or not judge.n_tokens:
        return whole, None
    fit = Moments(whole.second - judge.second, whole.n_tokens - judge.n_tokens)
    below = fit.second.diagonal() < -ROUNDING * whole.second.diagonal()
    if fit.n_tokens > 0 and not bool(below.any()):
        return fit, judge
    if site.expert is not None:  # of few tokens, all may be held out
        return whole, None
    raise UsageError(
        f"the held-out statistics of {site.name} ({judge.n_tokens} tokens) are not those of a part of the tokens of "
        f"the others ({whole.n_tokens}); collect them from every 8th window of the same text (collect_held_out)."
    )


def _warn_of_few(sites: list[FFNSite], stats: Statistics) -> None:
    tokens = {site: stats[site].counts.get("h_outer", 0) for site in sites}
    few = [site for site in sites if tokens[site] < TOKENS_PER_CHANNEL * site.d_ff]
    if few:
        worst = min(few, key=lambda site: tokens[site] / site.d_ff)
        warnings.warn(
            f"{len(few)} of {len(sites)} FFNs were calibrated on fewer than {TOKENS_PER_CHANNEL} tokens per channel "
            f"({worst.name}: {tokens[worst]} tokens for {worst.d_ff} channels), so that least squares fits noise. "
            "Calibrate on more text.",
            stacklevel=3,
        )
