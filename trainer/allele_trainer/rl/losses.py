"""Token losses: the training logprobs of a batch against the rollout's.

A loss gives one value per token and no reduction; the caller sums `loss · weight of the token's member`, so that a
member's gradient is that of training it alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from allele.protocol.commands import LossSpec


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """`[n]` each; `ratio` and `clipped` are for the report and carry no gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def ppo_clip(logprobs: Tensor, old: Tensor, advantages: Tensor, spec: LossSpec) -> TokenLoss:
    """−min(ρ·A, clip(ρ, 1−low, 1+high)·A), ρ = exp(logprob − rollout logprob).

    PPO, arXiv:1707.06347; with two bounds, DAPO, arXiv:2503.14476.
    """
    ratio = (logprobs - old).exp()
    bounded = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    with torch.no_grad():
        clipped = bounded * advantages < ratio * advantages
    return TokenLoss(loss, ratio.detach(), clipped)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor, LossSpec], TokenLoss]] = {"GRPO": ppo_clip}
