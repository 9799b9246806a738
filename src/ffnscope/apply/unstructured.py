"""Unstructured and semi-structured (N:M) sparsity of single weights: baselines beside channel pruning, not part of it.

Nothing gets smaller: the result is a model of the same shapes with zeros in it. Each method is a function and gives
`SparseWeights`; whether ``sparsity`` is of the FFNs or of all linear modules is asked for and told in its facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ffnscope.apply.patterns import Pattern, highest, pattern_of
from ffnscope.apply.sparse_run import BlockRun, Masked, OnBlock, finite, labelled
from ffnscope.apply.sparse_weights import SparseWeights
from ffnscope.apply.sparsegpt import BLOCK_SIZE, DAMPING, sparsegpt
from ffnscope.apply.targets import Scope, Target, Targets, check_group, find_targets
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.matrices import Matrix
from ffnscope.types import FFNSite


def magnitude_weights(model: nn.Module, sparsity: float | str, *, scope: Scope) -> SparseWeights:
    """Remove the weights of lowest magnitude: of each matrix as it is stored, or of each N:M group. No text is needed.

    Args:
        model: a `transformers` causal LM; unchanged.
        sparsity: fraction of the weights of every matrix to remove, or a pattern "N:M" (N of M inputs stay).
        scope: "ffn" = gate, up and down of every FFN, experts included; "linear" = every Linear and Conv1D of the
            decoder blocks. Embeddings and LM head always stay whole.

    Raises:
        UsageError: not a sparsity or scope; or a pattern that does not fit to a width.
        NotAvailableError: see `find_targets`.
        NonFiniteError: a weight is not finite.
    """
    pattern, targets = _asked(model, sparsity, scope)
    masks: dict[Matrix, Tensor] = {}
    for target in targets.all:
        weight = finite(target.matrix, target.matrix.weight(model))
        size = weight.abs()
        together = size if pattern.group is not None else size.reshape(1, -1)
        masks[target.matrix] = highest(together, pattern).view(weight.shape).cpu()
    return labelled(model, "magnitude", pattern, targets, masks, {})


def wanda_weights(
    model: nn.Module,
    windows: Windows,
    sparsity: float | str,
    *,
    scope: Scope,
    batch_size: int = 4,
    on_block: OnBlock | None = None,
) -> SparseWeights:
    """Remove the weights of lowest |W_ij| ||x_j||_2 in every row, block by block (Wanda, arXiv:2306.11695).

    ||x_j|| is the norm of input j over all valid calibration tokens; of an expert, over the tokens routed to it. An
    expert without tokens stays whole, with a warning. Memory beside the model: hidden states of all windows once, the
    masks, and d_ff numbers of 8 bytes per matrix.

    Args:
        model: a `transformers` causal LM; bit-identical afterwards, also after an exception.
        windows: calibration text.
        sparsity: fraction of every row to remove (rounded down), or a pattern "N:M" (N of M inputs stay).
        scope: see `magnitude_weights`.
        batch_size: windows per forward; changes speed and memory, not results beyond rounding.
        on_block: called with (blocks done, blocks in all) after each block.

    Raises:
        UsageError: see `magnitude_weights`; or no window.
        NotAvailableError: see `find_targets`; FFNs that are used several times, or with a norm before down (scope
            "ffn"); or a model that is no chain of blocks (see `open_blocks`).
        NonFiniteError: weights or activations are not finite.
        DeviceError: out of memory.
    """
    pattern, targets = _asked(model, sparsity, scope)

    def decide(target: Target, weight: Tensor, sums: Mapping[str, Tensor]) -> Masked:
        return _by_input_norms(target, weight, sums, pattern), None

    run = BlockRun(model, windows, targets, batch_size, on_block)
    return run.result("wanda", pattern, decide, outer=False, facts={})


def sparsegpt_weights(
    model: nn.Module,
    windows: Windows,
    sparsity: float | str,
    *,
    scope: Scope,
    batch_size: int = 4,
    on_block: OnBlock | None = None,
) -> SparseWeights:
    """SparseGPT (arXiv:2301.00774) on every matrix, block by block; see `sparsegpt` for what is done to one.

    Column blocks of 128 and a damping of 1 % of the mean diagonal, as published. Unstructured sparsity is of each
    block of columns. Memory beside the model: hidden states of all windows once, masks and new weights, and for each
    input of a block in^2 numbers of 8 bytes, with four times that for the matrix at work.

    For arguments and errors see `wanda_weights`.
    """
    pattern, targets = _asked(model, sparsity, scope)
    if pattern.group is not None and BLOCK_SIZE % pattern.group[1]:
        raise UsageError(f"SparseGPT works on {BLOCK_SIZE} columns at a time; {pattern.label} does not divide that.")

    def decide(target: Target, weight: Tensor, sums: Mapping[str, Tensor]) -> Masked:
        return sparsegpt(weight, sums[target.signal], pattern)

    facts = {"block_size": BLOCK_SIZE, "damping": DAMPING}
    return BlockRun(model, windows, targets, batch_size, on_block).result(
        "sparsegpt", pattern, decide, outer=True, facts=facts
    )


def dass_weights(
    model: nn.Module,
    windows: Windows,
    sparsity: float | str,
    *,
    alpha: float = 0.5,
    batch_size: int = 4,
    on_block: OnBlock | None = None,
) -> SparseWeights:
    """DaSS (arXiv:2405.01943) on gated FFNs: gate and up by what their channels amount to, down as `wanda_weights`.

    A weight of gate or up has the importance |W_ij| ||h_i||_2^alpha, with h_i the activation of its channel. All
    weights of a row share the norm, so they are compared within a column, over the channels, as in the public code; of
    N:M, the M neighbours are M channels of one input there, and M inputs of one output in down.

    Args:
        model: a `transformers` causal LM whose FFNs are gated; unchanged.
        windows: calibration text.
        sparsity: fraction of every column of gate and up, and of every row of down; or a pattern "N:M".
        alpha: weight of the norms; 0 ranks gate and up by magnitude.
        batch_size: see `wanda_weights`.
        on_block: see `wanda_weights`.

    Raises:
        UsageError: see `wanda_weights`; or an alpha that is negative or not finite.
        NotAvailableError: see `wanda_weights`; or an FFN without a gate.
    """
    if not 0 <= alpha < math.inf:
        raise UsageError(f"alpha must be finite and not negative; got {alpha}.")
    pattern = pattern_of(sparsity)
    targets = find_targets(model, "ffn")
    _check_gated(targets, pattern)

    def decide(target: Target, weight: Tensor, sums: Mapping[str, Tensor]) -> Masked:
        site = target.site
        if site is None or not target.makes_channels:
            return _by_input_norms(target, weight, sums, pattern), None
        strength = sums[f"{site.name}/h"].sqrt() ** alpha
        mask = torch.empty_like(weight, dtype=torch.bool)
        for rows in _halves(site):
            scores = weight[rows.to(weight.device)].double().abs() * strength[:, None]
            mask[rows.to(weight.device)] = highest(scores.T, pattern).T
        return mask, None

    facts = {"alpha": alpha, "axis": {"gate, up": "outputs (channels)", "down": "inputs (channels)"}}
    return BlockRun(model, windows, targets, batch_size, on_block).result(
        "dass", pattern, decide, outer=False, facts=facts
    )


def _asked(model: nn.Module, sparsity: float | str, scope: Scope) -> tuple[Pattern, Targets]:
    """What to remove, and from which matrices."""
    pattern, targets = pattern_of(sparsity), find_targets(model, scope)
    check_group(model, targets, pattern)
    return pattern, targets


def _by_input_norms(target: Target, weight: Tensor, sums: Mapping[str, Tensor], pattern: Pattern) -> Tensor:
    """Wanda's mask."""
    return highest(weight.double().abs() * sums[target.signal].sqrt(), pattern)


def _check_gated(targets: Targets, pattern: Pattern) -> None:
    for site in targets.sites:
        if site.gate is None:
            raise NotAvailableError(f"{site.name} has no gate; DaSS is defined for gated FFNs. Use wanda_weights.")
        if pattern.group is not None and site.d_ff % pattern.group[1]:
            raise UsageError(
                f"{site.name} has {site.d_ff} channels, which is no multiple of {pattern.group[1]}; the pattern "
                f"{pattern.label} does not fit. Use another pattern, or a fraction."
            )


def _halves(site: FFNSite) -> list[Tensor]:
    """Rows of gate and of up in the matrix that holds them, in the order of the channels."""
    channels = torch.arange(site.d_ff)
    if site.fused is None:
        return [channels]
    return [2 * channels, 2 * channels + 1] if site.fused == "interleaved" else [channels, channels + site.d_ff]
