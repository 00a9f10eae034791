"""Many proposals, few prompts: most of the prompts are spent on the proposals that did well on the first ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

# All proposals are measured on no more prompts than this.
FIRST_PART = 20
# Of the proposals, after each part but the last, the best one in so many stay.
ONE_IN = 2
# A gain holds if it is so many standard errors over prompts, and so much of the present cost.
CLEAR = 2.0
LEAST_SHARE = 0.05

Part = TypeVar("Part")
Proposal = TypeVar("Proposal")


def part_ends(prompts: int) -> tuple[int, ...]:
    """Where the parts of so many prompts end: each part but the first is as large as all before it, or a little larger.

    More prompts make more parts, so that they cost little: few proposals get as far as the last ones.
    """
    ends = [prompts]
    while ends[-1] > FIRST_PART:
        ends.append(ends[-1] // 2)
    return tuple(reversed(ends))


def survivors(
    proposals: Sequence[Proposal],
    parts: Iterable[Part],
    measure: Callable[[Part, list[Proposal]], np.ndarray],
) -> tuple[list[Proposal], np.ndarray]:
    """What is left of the proposals, in their order, and ``[prompts, 1 + left]`` costs, the present state first.

    Args:
        parts: of the prompts (:func:`part_ends`).
        measure: costs ``[prompts of a part, 1 + proposals]``, the present state first.
    """
    left, cost = list(proposals), np.empty((0, 1 + len(proposals)))
    for part in parts:
        if len(cost):
            gain = cost[:, :1].mean(0) - cost[:, 1:].mean(0)
            better = sorted(np.argsort(-gain, kind="stable")[: -(-len(left) // ONE_IN)].tolist())
            left, cost = [left[place] for place in better], cost[:, [0, *(1 + place for place in better)]]
        cost = np.concatenate([cost, measure(part, left)])
    return left, cost


def gains_of(cost: np.ndarray) -> dict[int, float]:
    """From ``[prompts, 1 + proposals]``, the present state first: mean gain of every proposal that holds.

    One holds where it gains on average more than :data:`CLEAR` standard errors over prompts, and :data:`LEAST_SHARE` of
    the present cost. A single prompt has no standard error, so that it decides nothing.
    """
    gain = cost[:, :1] - cost[:, 1:]
    if len(gain) < 2:
        return {}
    mean, error = gain.mean(0), gain.std(0, ddof=1) / len(gain) ** 0.5
    least = LEAST_SHARE * cost[:, 0].mean()
    return {place: float(mean[place]) for place in range(len(mean)) if mean[place] > max(CLEAR * error[place], least)}


def winner(
    proposals: Sequence[Proposal], parts: Iterable[Part], measure: Callable[[Part, list[Proposal]], np.ndarray]
) -> Proposal | None:
    """Of the :func:`survivors`, the one that gains most and holds, or ``None``."""
    if not proposals:
        return None
    left, cost = survivors(proposals, parts, measure)
    gains = gains_of(cost)
    return left[max(gains, key=lambda place: gains[place])] if gains else None
