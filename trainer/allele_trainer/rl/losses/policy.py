"""Policy gradients: the clipped ratio of PPO and its relatives, CISPO, and the distance to the base."""

from __future__ import annotations

import torch
from torch import Tensor

from allele.protocol.losses import Kl, PolicyLoss
from allele_trainer.rl.losses.corrections import correction
from allele_trainer.rl.losses.tokens import Terms, Tokens, given, ratio


def policy(tokens: Tokens, spec: PolicyLoss) -> Terms:
    """Formulas at `PolicyLoss`."""
    rollout, advantages = given(tokens.rollout, "rollout logprobs"), given(tokens.advantages, "advantages")
    now = tokens.logprobs.detach()
    rho = ratio(tokens.logprobs - (rollout if spec.against == "Rollout" else now), tokens.sequences, spec.ratio)
    surrogate = _cispo if spec.kind == "CISPO" else _clip
    loss, clipped = surrogate(tokens.logprobs, rho, advantages, spec)
    rejected = None
    if spec.correction is not None:
        factor = correction(now - rollout, tokens.sequences, spec.correction)
        rejected = factor == 0
        if spec.against == "Rollout":
            factor = (~rejected).to(factor.dtype)  # the ratio itself is the weight
        loss = loss * factor
    kl = None
    if spec.kl is not None:
        distance = tokens.logprobs - given(tokens.reference, "reference logprobs")
        kl = estimate(distance if spec.kl.estimator != "K1" else distance.detach(), spec.kl)
        if spec.kl.estimator != "K1":
            loss = loss + spec.kl.coefficient * kl
        kl = kl.detach()
    return Terms(loss, ratio=rho.detach(), clipped=clipped, rejected=rejected, kl=kl)


def _clip(_logprobs: Tensor, rho: Tensor, advantages: Tensor, spec: PolicyLoss) -> tuple[Tensor, Tensor]:
    bounded = rho.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    loss = -torch.minimum(rho * advantages, bounded * advantages)
    return loss, (bounded * advantages < rho * advantages).detach()


def _cispo(logprobs: Tensor, rho: Tensor, advantages: Tensor, spec: PolicyLoss) -> tuple[Tensor, Tensor]:
    weight = rho.detach().clamp(max=1 + spec.clip_high)
    return -weight * advantages * logprobs, rho.detach() > 1 + spec.clip_high


def estimate(distance: Tensor, kl: Kl) -> Tensor:
    """Value per token of an estimator of KL(π ‖ base), from log π − log π_base of tokens that π sampled."""
    if kl.estimator == "K1":
        return distance
    if kl.estimator == "K2":
        return 0.5 * distance.square()
    return (-distance).exp() + distance - 1
