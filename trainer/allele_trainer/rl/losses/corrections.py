"""Weights for samples that another policy drew: pure functions of log π − log π_r, without gradient."""

from __future__ import annotations

import math

from torch import Tensor

from allele.protocol.losses import Correction
from allele_trainer.rl.losses.tokens import Sequences, ratio


def correction(log_ratio: Tensor, sequences: Sequences, spec: Correction) -> Tensor:
    """`[n]` weight of each token; formulas at `Correction`. A weight that is not a number stays one."""
    weight = ratio(log_ratio, sequences, spec.level)
    if spec.kind == "TIS":
        found = weight.clamp(min=spec.low, max=spec.high)
    else:
        outside = (weight > spec.high) | (weight < (spec.low or 0.0))
        kept = weight if spec.kind != "Rejection" else weight.new_ones(()).expand_as(weight)
        found = kept.masked_fill(outside, 0.0)
    if spec.veto is not None:
        vetoes = sequences.sums((log_ratio < math.log(spec.veto)).to(weight.dtype))
        found = found.masked_fill(sequences.spread(vetoes) > 0, 0.0)
    return found
