"""A model whose FFNs are masked per token wherever text is read, to measure what a selection costs in quality."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.sparse.predictors.fixed import PromptConstant
from ffnscope.sparse.runtime import Runtime
from ffnscope.sparse.selector import HandsOn, Noted, Selector
from ffnscope.sparse.uses import Selector as Select
from ffnscope.sparse.uses import Step
from ffnscope.types import FFNSite


@dataclass(slots=True, eq=False)
class Selected:
    """What was selected while a model ran under masks.

    Attributes:
        prompt: tokens at the beginning of each window that run dense and are not counted.
        channels: selected, summed over tokens.
        tokens: that were selected for.
        batch: the windows that run.
        noted: inputs of FFNs that predictors one layer after read.
    """

    prompt: int
    channels: dict[FFNSite, int] = field(default_factory=dict[FFNSite, int])
    tokens: dict[FFNSite, int] = field(default_factory=dict[FFNSite, int])
    batch: Windows | None = None
    noted: dict[FFNSite, Noted] = field(default_factory=dict[FFNSite, Noted])

    def begin(self, batch: Windows) -> None:
        """Say which windows run next, so that padding and prompts are told apart."""
        self.batch = batch

    def densities(self) -> dict[FFNSite, float]:
        """Mean share of the channels that was selected for a token."""
        return {s: n / (self.tokens[s] * s.d_ff) for s, n in self.channels.items() if self.tokens[s]}

    def rows(self, n: int) -> Tensor | None:
        """Which of ``n`` rows of a batch are tokens to select for, bool [n]; None where rows are no batch of tokens."""
        if self.batch is None or self.batch.valid.numel() != n:
            return None
        counted = self.batch.valid.clone()
        counted[:, : self.prompt] = False
        return counted.flatten()


@contextlib.contextmanager
def masked_by(model: nn.Module, selectors: Mapping[FFNSite, Select], prompt: int = 0) -> Generator[Selected]:
    """Within the block, h of every token is multiplied by its mask, in prefill too; products are dense.

    Nothing gets faster and nothing is copied: it is the definition that `wrap_` computes.

    Args:
        model: a causal LM in memory.
        selectors: site -> function of x [T, d_model] that gives the mask [T, d_ff] of bool, True = keep.
        prompt: tokens at the beginning of each window that run dense, as a prompt does in decoding. A `PromptConstant`
            takes its scores from them.

    Yields:
        What was selected; tell it every batch (`Selected.begin`).

    Raises:
        UsageError: no selectors.
        NotAvailableError: a prompt where an FFN is an expert; a predictor that looks ahead, of a selector that does
            not say at the input of which FFN.
    """
    if not selectors:
        raise UsageError("no selectors were given; expected one per FFN that is to be masked, as {site: function}.")
    for site, select in selectors.items():
        _check(site, prompt)
        if isinstance(select, Selector) and select.predictor.lookahead and select.source is None:
            raise NotAvailableError(
                f"the predictor of {site.name} looks ahead from the FFN one layer before, and its selector does not "
                "say which that is. Give Selector.source, or use a predictor with lookahead 0."
            )
    selected = Selected(prompt)
    sources = {one.source for one in selectors.values() if isinstance(one, Selector) and one.source is not None}
    selected.noted = {source: Noted() for source in sources}
    rules = {site: _rule(site, select, selected) for site, select in selectors.items()}
    rules |= {source: HandsOn(source.d_ff, one) for source, one in selected.noted.items() if source not in selectors}
    runtime = Runtime(model, rules, 0.0, Step(prefill=True))
    try:
        for site in rules:
            runtime.keep(site, "masked")
        yield selected
    finally:
        runtime.close()


def _check(site: FFNSite, prompt: int) -> None:
    if prompt and site.expert is not None:
        raise NotAvailableError(
            f"{site.name} is an expert, which does not know where in a window its tokens are; use no prompt."
        )


def _rule(site: FFNSite, select: Select, selected: Selected) -> Select:
    source = select.source if isinstance(select, Selector) else None

    def select_by(x: Tensor, which: Tensor | None) -> Tensor:
        """The masks of some rows of x, which a predictor that looks ahead takes from the noted input."""
        if source is None or not isinstance(select, Selector):
            return select(x if which is None else x[which])
        noted = selected.noted[source].x
        assert noted is not None and len(noted) == len(x), "the FFN one layer before ran just now, on the same tokens"
        return select.of_scores(select.predictor(noted if which is None else noted[which]))

    @torch.no_grad()
    def rule(x: Tensor) -> Tensor:
        if site in selected.noted:
            selected.noted[site].x = x
        counted = None if site.expert is not None else selected.rows(len(x))  # an expert's tokens are in its own order
        if counted is None:
            mask = select_by(x, None)
            _count(site, selected, mask)
            return mask
        counted = counted.to(x.device)
        mask = torch.ones(len(x), site.d_ff, dtype=torch.bool, device=x.device)
        if isinstance(select, Selector) and isinstance(select.predictor, PromptConstant) and selected.prompt:
            found = _after_prompts(select, select.predictor, x, counted, selected)
        else:
            found = select_by(x, counted)
        _count(site, selected, found)
        mask[counted] = found
        return mask

    return rule


def _after_prompts(
    select: Selector, predictor: PromptConstant, x: Tensor, counted: Tensor, selected: Selected
) -> Tensor:
    """Masks of the counted tokens, with scores of the prompt of each window."""
    assert selected.batch is not None
    shape = selected.batch.valid.shape
    found: list[Tensor] = []
    for row, (tokens, which) in enumerate(zip(x.view(*shape, -1), counted.view(shape), strict=True)):
        if bool(which.any()):
            predictor.begin(tokens[: selected.prompt][selected.batch.valid[row, : selected.prompt].to(x.device)])
            found.append(select(tokens[which]))
    return torch.cat(found) if found else torch.zeros(0, predictor.ffn.d_ff, dtype=torch.bool, device=x.device)


def _count(site: FFNSite, selected: Selected, mask: Tensor) -> None:
    selected.channels[site] = selected.channels.get(site, 0) + int(mask.sum())
    selected.tokens[site] = selected.tokens.get(site, 0) + len(mask)
