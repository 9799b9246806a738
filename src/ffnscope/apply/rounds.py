"""Prune in rounds: score, remove some, reconstruct, and score again what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ffnscope.apply.pruned import Pruned, as_pruned
from ffnscope.io import hash_json, plan_from_dict, plan_to_dict, read_state, write_state
from ffnscope.plan.build import build_plan
from ffnscope.plan.nested import plan_within, round_sparsities
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores

if TYPE_CHECKING:
    from ffnscope.apply.method import Method


@dataclass(frozen=True, slots=True, eq=False)
class RoundSteps:
    """What the rounds after the first are made of.

    Attributes:
        again: number of the round, from 2 -> scores of the model as it is: that of the round before.
        refit: plan -> the plan with columns fitted to the dense model, or the plan alone.
        folder: keeps the plan of every finished round, from which an interrupted call goes on; None keeps nothing.
        protected: channels that stay in all rounds.
    """

    again: Callable[[int], Scores]
    refit: Callable[[PruningPlan], Pruned]
    folder: Path | None = None
    protected: Mapping[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])


def plan_in_rounds(model: nn.Module, scores: Scores, budget: Budget, method: Method, steps: RoundSteps) -> PruningPlan:
    """Build a plan in the rounds of a method; with one, `build_plan`.

    Every round keeps the same share of what the one before has left. From the second on, scores are those of the model
    that is pruned and reconstructed so far; what a round has removed stays removed. The columns of a round are fitted
    to the dense model, as the caller fits those of the result, so rounds change which channels stay and nothing else.

    Args:
        model: the dense model; left as it was.
        scores: of the dense model.
        budget: how much to remove in all.
        method: its allocator and number of rounds are read.
        steps: how the later rounds score and reconstruct.

    Raises:
        UsageError: see `build_plan`.
        ArtifactError: a plan that was kept is damaged, or cannot be written.
    """
    budgets = [replace(budget, sparsity=share) for share in round_sparsities(budget.sparsity, method.rounds)]
    plan = build_plan(scores, budgets[0], method.allocator, protected=steps.protected)
    key = hash_json([plan_to_dict(plan), asdict(method), asdict(budget)])
    for number, asked in enumerate(budgets[1:], 2):
        path = None if steps.folder is None else steps.folder / f"round_{number}_{key}.json"
        if path is not None and path.exists():
            plan = read_round(path)
            continue
        with as_pruned(model, steps.refit(plan)):
            found = steps.again(number)
        found = replace(found, facts={**scores.facts, **found.facts, **_told(scores, found, budgets[:number])})
        plan = plan_within(found, asked, method.allocator, plan, steps.protected)
        if path is not None:
            write_state(path, plan_to_dict(plan))
    return plan


def read_round(path: Path) -> PruningPlan:
    """The plan of a finished round.

    Raises:
        ArtifactError: the file is damaged.
    """
    return plan_from_dict(path, read_state(path))


def _told(first: Scores, found: Scores, budgets: Sequence[Budget]) -> dict[str, Any]:
    """Facts of a round: sparsities so far, and experts that no token reached, in the dense model or since."""
    unreached = {name: None for one in (first, found) for name in one.facts.get("unreached", ())}
    rounds = {"rounds": [budget.sparsity for budget in budgets]}
    return {**rounds, "unreached": list(unreached)} if unreached else rounds
