"""Learning rate by a member's own step: pure."""

from __future__ import annotations

import math

from allele.api.run import Optimizer


def learning_rate(optimizer: Optimizer, *, step: int, horizon: int) -> float:
    """Rate of a member's own step 1, 2, …: up to learningRate in warmupSteps, then to its final part at `horizon`.

    Linear, or half a period of the cosine (arXiv:1608.03983). After the horizon the rate stays what it is there.
    """
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if step <= warmup:
        return rate * step / warmup
    top = max(warmup, 1)
    if optimizer.schedule == "Constant" or horizon <= top:
        return rate
    gone = min(1.0, (step - top) / (horizon - top))
    if optimizer.schedule == "Cosine":
        gone = (1 - math.cos(math.pi * gone)) / 2
    return rate * (1 - (1 - optimizer.final_fraction) * gone)
