"""Learning rate by step: pure."""

from __future__ import annotations

from allele.api.run import Optimizer


def learning_rate(optimizer: Optimizer, *, step: int, steps: int) -> float:
    """Rate of step 1 … `steps`. Linear goes from learningRate at the first step to finalFraction of it at the last."""
    if optimizer.schedule == "Constant" or steps == 1:
        return optimizer.learning_rate
    gone = min(1.0, (step - 1) / (steps - 1))
    return optimizer.learning_rate * (1 - (1 - optimizer.final_fraction) * gone)
