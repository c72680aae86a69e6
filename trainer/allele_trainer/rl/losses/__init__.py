"""Token losses, a pure function for each kind of specification.

A loss gives one value per token and no reduction; the caller sums `value · weight of its row`, so that a member's
gradient is that of training it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from allele_trainer.rl.losses.distillation import distillation
from allele_trainer.rl.losses.policy import policy
from allele_trainer.rl.losses.supervised import preference, supervised
from allele_trainer.rl.losses.tokens import Sequences, Teacher, Terms, Tokens

__all__ = ["LOSSES", "Sequences", "Teacher", "Terms", "Tokens"]

LOSSES: Mapping[str, Callable[[Tokens, Any], Terms]] = {
    "Clip": policy,
    "CISPO": policy,
    "SFT": supervised,
    "DPO": preference,
    "Distillation": distillation,
}
"""By `kind`; the second argument is the specification of that kind."""
