"""Training of low-rank predictors: two losses, early stopping on missed mass, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.io import disposable, expect_kind, hash_json, hash_tensors, read_tensors, write_tensors
from ffnscope.sparse.labels import largest, nonzero
from ffnscope.sparse.measures import missed_mass
from ffnscope.sparse.predictors.interface import FitTokens, OnEpoch
from ffnscope.sparse.predictors.low_rank import LowRank
from ffnscope.sparse.predictors.training_options import TrainingOptions
from ffnscope.sparse.split import hash_order

KIND = "predictor training"
HELD_OUT = 0.1
"""Share of the documents (of the tokens, where documents are not known) to judge by."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A trained predictor.

    Attributes:
        predictor: as it was after the best epoch, in the dtype of the FFN's weights.
        missed_mass: on the tokens to judge by, at the target density, before training and after each epoch.
        best_epoch: the epoch that was kept; 0 = before training.
    """

    predictor: LowRank
    missed_mass: tuple[float, ...]
    best_epoch: int


@dataclass(slots=True, eq=False)
class _State:
    """All that training goes on from."""

    epoch: int
    missed: list[float]
    best: dict[str, Tensor]


def train_low_rank(
    predictor: LowRank,
    fit: FitTokens,
    options: TrainingOptions | None = None,
    *,
    checkpoint: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> Trained:
    """Train a predictor from its random start, in float32 with AdamW, and keep the epoch that misses least.

    Contributions are computed batch by batch and never stored.

    Args:
        predictor: changed in place, and part of the result.
        fit: tokens; a tenth of their documents is held out to judge by, or their last tenth where documents are not
            given.
        options: see there.
        checkpoint: file that is written after each epoch. A call with the same arguments goes on from it and gives what
            the unbroken one gives; one of other arguments is overwritten. It stays when training has ended.
        on_epoch: see `OnEpoch`.

    Raises:
        UsageError: no tokens to fit or to judge by; a lookahead without earlier inputs.
        NonFiniteError: contributions or logits are NaN or infinite.
        ArtifactError: the checkpoint is damaged, or another kind of file.
    """
    options = options or TrainingOptions()
    inputs = _inputs(predictor, fit)
    train, judge = _held_out(fit, options.seed)
    predictor.float().train()
    predictor.begin_(options.seed)
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, foreach=False
    )
    key = "" if checkpoint is None else _key(predictor, fit, options)
    state = _read(checkpoint, key, predictor, optimizer)
    if state is None:
        state = _State(0, [_judge(predictor, fit, inputs, judge, options)], _copy(predictor))
    while state.epoch < options.epochs and not _is_over(state.missed, options.patience):
        _epoch(predictor, optimizer, fit, inputs, train, (options, state.epoch))
        state.epoch += 1
        state.missed.append(_judge(predictor, fit, inputs, judge, options))
        if state.missed[-1] < min(state.missed[:-1]):
            state.best = _copy(predictor)
        _write(checkpoint, key, predictor, optimizer, state)
        if on_epoch is not None:
            on_epoch(state.epoch, options.epochs, state.missed[-1])
    predictor.load_state_dict(state.best)
    predictor.to(fit.x.dtype).eval().requires_grad_(False)
    return Trained(predictor, tuple(state.missed), state.missed.index(min(state.missed)))


def mass_loss(logits: Tensor, labels: Tensor, contributions: Tensor) -> Tensor:
    """Mean binary cross-entropy, positives weighed by contribution over the mean one of the token's positives.

    Unlike Deja Vu's (`published_loss`) a miss costs what it takes from the output.

    Args:
        logits: scores before the sigmoid [T, d_ff].
        labels: wanted channels [T, d_ff] of bool.
        contributions: |h_i| ||W_down[:, i]|| [T, d_ff].
    """
    wanted = contributions * labels
    mean = wanted.sum(-1, keepdim=True) / labels.sum(-1, keepdim=True).clamp_min(1)
    weight = torch.where(labels, wanted / mean.where(mean > 0, 1.0), 1.0)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits), weight.to(logits))


def published_loss(logits: Tensor, labels: Tensor, contributions: Tensor) -> Tensor:
    """Mean binary cross-entropy of Deja Vu: positives weigh 1, negatives the batch's share of positives + 0.005.

    Source: the training script that Deja Vu (arXiv:2310.17157) published. Args: see `mass_loss`; ``contributions`` do
    not count.
    """
    positive = labels.to(logits)
    base = positive.mean() + 0.005
    return nn.functional.binary_cross_entropy_with_logits(logits, positive, positive * (1 - base) + base)


_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"mass": mass_loss, "published": published_loss}


def _inputs(predictor: LowRank, fit: FitTokens) -> Tensor:
    if predictor.lookahead == 0:
        return fit.x
    if fit.earlier is None:
        raise UsageError("a lookahead of 1 reads the input of the FFN one layer before; give FitTokens.earlier.")
    return fit.earlier


def _held_out(fit: FitTokens, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of tokens to fit, and of those to judge by."""
    n_tokens = len(fit.x)
    judge = torch.arange(n_tokens) >= n_tokens - max(1, round(HELD_OUT * n_tokens))
    if fit.document is not None and fit.document.unique().numel() > 1:
        documents = hash_order(fit.document.unique().tolist(), seed)
        chosen = documents[: max(1, round(HELD_OUT * len(documents)))]
        judge = torch.isin(fit.document.cpu(), torch.tensor(chosen))
    if not bool(judge.any()) or bool(judge.all()):
        raise UsageError(f"training needs tokens to fit and others to judge by; {n_tokens} are not enough.")
    return (~judge).nonzero().flatten(), judge.nonzero().flatten()


@torch.enable_grad()
def _epoch(
    predictor: LowRank,
    optimizer: torch.optim.Optimizer,
    fit: FitTokens,
    inputs: Tensor,
    train: Tensor,
    at: tuple[TrainingOptions, int],
) -> None:
    options, epoch = at
    random = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    for rows in train[torch.randperm(len(train), generator=random)].split(options.batch_size):
        rows = rows.to(inputs.device)
        contributions, logits = predictor.ffn.contributions(fit.x[rows]).float(), predictor.logits(inputs[rows])
        for what, value, cure in (
            ("contributions", contributions, "look for NaN in the traces"),
            ("logits of the predictor", logits, "lower the learning rate"),
        ):
            if not bool(torch.isfinite(value).all()):
                place = f"{what} of {predictor.ffn.name}, epoch {epoch + 1} of training"
                raise NonFiniteError(f"{place}: NaN or infinite; {cure}.")
        labels = largest(contributions, options.density) & nonzero(contributions)
        loss = _LOSSES[options.loss](logits, labels, contributions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _judge(predictor: LowRank, fit: FitTokens, inputs: Tensor, rows: Tensor, options: TrainingOptions) -> float:
    """Mean missed mass over some tokens of the channels with the highest logits, at the target density."""
    total = 0.0
    for part in rows.split(1024):
        part = part.to(inputs.device)
        mask = largest(predictor.logits(inputs[part]), options.density)
        total += float(missed_mass(mask, predictor.ffn.contributions(fit.x[part])).sum())
    return total / len(rows)


def _is_over(missed: list[float], patience: int) -> bool:
    return len(missed) - 1 - missed.index(min(missed)) >= patience


def _copy(predictor: LowRank) -> dict[str, Tensor]:
    return copy.deepcopy(predictor.state_dict())


def _key(predictor: LowRank, fit: FitTokens, options: TrainingOptions) -> str:
    """Hash of all that the result depends on."""
    weights = predictor.ffn.weights
    tensors = {"x": fit.x, "document": fit.document, "earlier": fit.earlier, "gate": weights.gate}
    tensors |= {"up": weights.up, "down": weights.down}
    found = hash_tensors((name, value) for name, value in tensors.items() if value is not None)
    shape = [list(value.shape) for value in predictor.state_dict().values()]
    return hash_json([found, asdict(options), shape, predictor.relu, predictor.lookahead])


def _write(path: Path | None, key: str, predictor: LowRank, optimizer: torch.optim.Optimizer, state: _State) -> None:
    if path is None:
        return
    tensors = {f"model/{name}": value for name, value in predictor.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in values.items()}
    write_tensors(path, tensors, {"kind": KIND, "key": key, "epoch": state.epoch, "missed": state.missed})


def _read(path: Path | None, key: str, predictor: LowRank, optimizer: torch.optim.Optimizer) -> _State | None:
    """Put predictor and optimizer where the file says, if there is one of these arguments."""
    if path is None or not path.exists():
        return None
    with disposable("the predictor is trained again"):
        tensors, facts = read_tensors(path)
        expect_kind(path, facts, KIND)
    if facts.get("key") != key:
        return None
    predictor.load_state_dict(_part(tensors, "model/"))
    moments: dict[int, dict[str, Any]] = {}
    for name, value in _part(tensors, "optimizer/").items():
        index, _, what = name.partition("/")
        moments.setdefault(int(index), {})[what] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return _State(facts["epoch"], list(facts["missed"]), _part(tensors, "best/"))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
