"""From rewards to advantages: pure.

GRPO (arXiv:2402.03300, eq. 1): A_i = (r_i − mean(r)) / (std(r) + ε) over the samples of one prompt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TypeGuard

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL and verl."""


def group_normalised(rewards: Sequence[float | None]) -> list[float | None]:
    """Advantages of one prompt's samples; None where a sample takes no part.

    A reward that is None (dropped) or not finite takes no part in mean and deviation either. A group whose remaining
    rewards are all equal, or that has fewer than two, says nothing about what is better: all of it is dropped.
    The deviation is the sample's (n − 1), torch's default.
    """
    kept = [r for r in rewards if usable(r)]
    if len(kept) < 2 or min(kept) == max(kept):
        return [None] * len(rewards)
    mean, deviation = statistics.fmean(kept), statistics.stdev(kept)
    return [(r - mean) / (deviation + EPSILON) if usable(r) else None for r in rewards]


def usable(reward: float | None) -> TypeGuard[float]:
    """Whether a reward is a finite number."""
    return reward is not None and math.isfinite(reward)
