"""Which rule an answer recommends, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ffnscope.sparse.answer_rows import RULES, Calibration, EqualDensity, Reuse
from ffnscope.sparse.calibration import Target

DRIFT = 0.01
"""How much more a rule may lose than top-k on another text, in units of the target's measure."""


def recommend(
    equal: Sequence[EqualDensity], reuse: Sequence[Reuse], calibrations: Sequence[Calibration], target: Target
) -> tuple[str, str]:
    """The rule, and the reason in sentences.

    A rule other than top-k is taken when at equal density it is better beyond its interval in at least one domain and
    worse beyond it in none (perplexity where it was measured, else missed mass), and when its parameters lose no more
    than `DRIFT` more than those of top-k in any other domain. Of several, the one with the larger gain. Otherwise
    top-k, whose cost is the same for every token.
    """
    drift = {rule: _worst(rule, reuse, target) for rule in RULES}
    gains = {rule: _gain(rule, equal) for rule in RULES[1:]}
    steady = {rule: gain for rule, gain in gains.items() if drift[rule] <= drift[RULES[0]] + DRIFT}
    better = {rule: gain for rule, gain in steady.items() if gain is not None}
    chosen = min(better, key=lambda rule: better[rule]) if better else RULES[0]
    sentences = [_quality(rule, equal) for rule in RULES[1:]]
    sentences.append(
        f"With parameters of another domain, {target.measure} is at worst "
        + ", ".join(f"{100 * drift[rule]:.1f} points {rule}" for rule in RULES)
        + " worse than with the domain's own."
    )
    if better:
        spread = _spread(chosen, calibrations)
        sentences.append(
            f"So {chosen}; its tokens keep {spread[0]:.0%} to {spread[1]:.0%} of the channels (5th to 95th percentile, "
            "mean of FFNs), so where every token must cost the same, take top_k."
        )
    else:
        sentences.append("No rule is better beyond its interval and as steady, so top_k: every token costs the same.")
    return chosen, " ".join(sentences)


def _gain(rule: str, equal: Sequence[EqualDensity]) -> float | None:
    """Mean difference to top-k over domains where that is a gain, else None."""
    found = [one.loss or one.against["missed_mass"] for one in equal if one.rule == rule]
    signs = [one.sign for one in found]
    if not found or max(signs) > 0 or min(signs) == 0:
        return None
    return sum(one.value for one in found) / len(found)


def _quality(rule: str, equal: Sequence[EqualDensity]) -> str:
    rows = [one for one in equal if one.rule == rule]
    if all(one.loss is not None for one in rows):
        words = [
            f"{100 * math.expm1(one.loss.value):+.2f} % in {one.domain}{_told(one.loss.sign)}"
            for one in rows
            if one.loss is not None
        ]
        return f"At the density of top_k, {rule} changes perplexity by " + ", ".join(words) + "."
    found = [(one.domain, one.against["missed_mass"]) for one in rows]
    words = [f"{100 * value.value:+.2f} points in {name}{_told(value.sign)}" for name, value in found]
    return f"At the density of top_k, {rule} changes missed mass by " + ", ".join(words) + "."


def _told(sign: int) -> str:
    return "" if sign else " (not told apart)"


def _worst(rule: str, reuse: Sequence[Reuse], target: Target) -> float:
    """How much worse the target's measure gets in another domain, at most; 0 where it never does."""
    sense = -1 if target.measure == "recall" else 1
    return max([0.0, *(sense * one.difference.value for one in reuse if one.rule == rule)])


def _spread(rule: str, calibrations: Sequence[Calibration]) -> tuple[float, float]:
    rows = [one.density for one in calibrations if one.rule == rule]
    return sum(one.p5 for one in rows) / len(rows), sum(one.p95 for one in rows) / len(rows)
