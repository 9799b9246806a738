"""Predictors that do not look at the token: a constant selection, that of a prompt, and chance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ffnscope.errors import NotAvailableError, UsageError, unknown_name
from ffnscope.ffn.function import FFN
from ffnscope.io import read_plan
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, Prompted, needed, token_mean
from ffnscope.unchanged import while_unchanged


class Constant(Predictor):
    """The same scores for every token; nothing is read while decoding."""

    scores: Tensor

    def __init__(self, ffn: FFN, scores: Tensor):
        super().__init__(ffn)
        self.register_buffer("scores", scores.float())

    @property
    def bytes_read(self) -> int:
        """None: the selection is made once."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff]."""
        check_input(self.ffn, x)
        return self.scores.expand(len(x), -1)


class PromptConstant(Prompted):
    """Scores of the tokens of a prompt, the same for all that is generated after it.

    Attributes:
        prompt: see `Prompted`.
        scores: [d_ff]; None until a prompt is given.
    """

    def __init__(self, ffn: FFN, scores: Tensor | None, prompt: int = 0):
        super().__init__(ffn)
        self.prompt, self.scores = prompt, scores

    @property
    def bytes_read(self) -> int:
        """None: the selection is made once per prompt."""
        return 0

    def begin(self, x: Tensor) -> None:
        """Take the scores of a new prompt, x [T, d_model]."""
        self.scores = griffin_scores(self.ffn, x)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff]; raises NotAvailableError before the first prompt."""
        check_input(self.ffn, x)
        if self.scores is None:
            raise NotAvailableError(
                f"the selection of {self.ffn.name} is that of a prompt (griffin), and none has been given. Call "
                "ffnscope.begin_prompt(model, input_ids, wrap_(model, card)) before the model generates."
            )
        return self.scores.to(x.device).expand(len(x), -1)


class Chance(Predictor):
    """Uniform random scores, a function of the bits of a token's input and of a seed."""

    def __init__(self, ffn: FFN, seed: int):
        super().__init__(ffn)
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff]."""
        check_input(self.ffn, x)
        return torch.stack([self._row(row) for row in x]) if len(x) else x.new_zeros(0, self.ffn.d_ff).float()

    def _row(self, row: Tensor) -> Tensor:
        raw = row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.blake2b(raw, digest_size=7, salt=str(self.seed).encode()[:16]).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.rand(self.ffn.d_ff, generator=random).to(row.device)


@predictor("random", source="baseline")
def random(ffn: FFN, fit: FitTokens | None = None, *, seed: int = 0) -> Predictor:
    """Random channels, other ones for every token: the floor of every comparison.

    Args:
        ffn: the FFN.
        fit: not used.
        seed: other seeds, other channels.
    """
    return Chance(ffn, seed)


@predictor("static", source="baseline; a pruning plan as a constant selection is our own")
def static(ffn: FFN, fit: FitTokens | None, *, kept: Tensor | None = None, plan: str | None = None) -> Predictor:
    """The mean contribution over calibration tokens, or the kept channels of a pruning plan, for every token.

    Args:
        ffn: the FFN.
        fit: tokens; not needed with ``kept`` or ``plan``.
        kept: indices of channels (`PruningPlan.kept`), which get the score 1, all others 0.
        plan: file of a pruning plan, from which ``kept`` is taken by the name of the FFN.

    Raises:
        UsageError: neither tokens nor kept channels, both a plan and channels, a plan without this FFN, or channels
            that the FFN does not have.
        ArtifactError: a plan that cannot be read.
    """
    if plan is not None:
        if kept is not None:
            raise UsageError("static takes kept channels or the file of a plan; give one of the two.")
        kept = kept_by(Path(plan), ffn.name)
    if kept is None:
        return Constant(ffn, token_mean(needed(fit, "static").x, ffn.contributions))
    if not kept.numel() or not 0 <= int(kept.min()) <= int(kept.max()) < ffn.d_ff:
        raise UsageError(f"kept must be one or more channels in [0, {ffn.d_ff}) of {ffn.name}.")
    return Constant(ffn, torch.zeros(ffn.d_ff).index_fill_(0, kept.cpu(), 1).to(ffn.weights.up.device))


def kept_by(path: Path, name: str) -> Tensor:
    """Channels [k] int64 that the plan in a file keeps of the FFN of a name.

    Raises:
        UnknownNameError: the plan has no such FFN.
        ArtifactError: a plan that cannot be read.
    """
    kept = _kept(path)
    if name not in kept:
        raise unknown_name(f"FFN of the plan {path}", name, kept)
    return kept[name].clone()


@while_unchanged
def _kept(path: Path) -> dict[str, Tensor]:
    """The same of every FFN of the plan, by name."""
    return {site.name: index for site, index in read_plan(path).kept.items()}


@predictor("griffin", source="GRIFFIN (arXiv:2404.01365)")
def griffin(ffn: FFN, fit: FitTokens | None, *, prompt: int = 0) -> Predictor:
    """The channels that a prompt uses, for all that follows: norms over tokens of h, each token's scaled to length 1.

    Args:
        ffn: the FFN.
        fit: the prompt; ``begin(x)`` of what is returned takes another one. Not needed with ``prompt``.
        prompt: tokens at the beginning of each window that are its prompt where a selection is calibrated or measured;
            0: ``fit`` is the prompt.

    Raises:
        UsageError: neither tokens nor a length of prompts.
    """
    if prompt < 0:
        raise UsageError(f"prompt must be a number of tokens, at least 0; got {prompt}.")
    return PromptConstant(ffn, None if prompt else griffin_scores(ffn, needed(fit, "griffin").x), prompt)


def griffin_scores(ffn: FFN, x: Tensor) -> Tensor:
    """Scores [d_ff] of a prompt x [T, d_model]."""

    def squares(part: Tensor) -> Tensor:
        h = ffn.h(part).double().square()
        return h / h.sum(-1, keepdim=True).clamp_min(1e-300)

    return (token_mean(x, squares) * len(x)).sqrt().float()
