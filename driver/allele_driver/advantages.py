"""From rewards to advantages: pure.

A reward that is None (dropped) or not finite takes no part, in means and deviations neither. Samples of one prompt are
compared with each other; a prompt whose remaining rewards are all equal, or that has fewer than two, says nothing about
what is better, and all of it is dropped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL and verl."""

Rewards = Sequence[float | None]
Advantages = list[float | None]


def group_normalised(rewards: Rewards) -> Advantages:
    """(r_i − mean) / (std + ε) (GRPO, arXiv:2402.03300, eq. 1), with the sample's deviation (n − 1), as torch."""
    kept = telling(rewards)
    if not kept:
        return [None] * len(rewards)
    mean, deviation = statistics.fmean(kept), statistics.stdev(kept)
    return [(r - mean) / (deviation + EPSILON) if usable(r) else None for r in rewards]


def centred(rewards: Rewards) -> Advantages:
    """r_i − mean: without the deviation prompts of all difficulties weigh the same (Dr. GRPO, arXiv:2503.20783)."""
    kept = telling(rewards)
    if not kept:
        return [None] * len(rewards)
    mean = statistics.fmean(kept)
    return [r - mean if usable(r) else None for r in rewards]


def leave_one_out(rewards: Rewards) -> Advantages:
    """r_i − mean of the others = n/(n − 1)·(r_i − mean) (RLOO, arXiv:2402.14740)."""
    n = len(telling(rewards))
    return [None if a is None else a * n / (n - 1) for a in centred(rewards)]


def as_they_are(rewards: Rewards) -> Advantages:
    """The rewards; the trainer normalises them over the member's tokens (REINFORCE++, arXiv:2501.03262)."""
    return [r if usable(r) else None for r in rewards]


def less_the_mean(rewards: Rewards) -> Advantages:
    """r_i − mean, also where it is 0 for all: such prompts count in what is normalised later (REINFORCE++-baseline)."""
    kept = [r for r in rewards if usable(r)]
    mean = statistics.fmean(kept) if kept else 0.0
    return [r - mean if usable(r) else None for r in rewards]


ADVANTAGES: Mapping[str, Callable[[Rewards], Advantages]] = {
    "GRPO": group_normalised,
    "DrGRPO": centred,
    "DAPO": group_normalised,
    "GSPO": group_normalised,
    "CISPO": group_normalised,
    "RLOO": leave_one_out,
    "REINFORCE++": as_they_are,
    "REINFORCE++Baseline": less_the_mean,
}
"""By the name of the algorithm: advantages of one prompt's samples, None where a sample takes no part."""


def overlong(length: int, *, longest: int, cache: int, penalty: float) -> float:
    """What a completion gets for its length: 0 up to `longest − cache`, then falling to −penalty at `longest`.

    DAPO, arXiv:2503.14476, eq. 13.
    """
    return -penalty * min(max(length - (longest - cache), 0) / cache, 1.0)


def telling(rewards: Rewards) -> list[float]:
    """The usable rewards of a prompt, or none when they say nothing about what is better."""
    kept = [r for r in rewards if usable(r)]
    return [] if len(kept) < 2 or min(kept) == max(kept) else kept


def usable(reward: float | None) -> TypeGuard[float]:
    """Whether a reward is a finite number."""
    return reward is not None and math.isfinite(reward)
