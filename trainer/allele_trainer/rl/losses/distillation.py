"""Token-level distillation: divergence from a teacher's distribution, coarsened to its most likely tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from allele.protocol.losses import DistillationLoss
from allele_trainer.rl.losses.tokens import MissingInput, Terms, Tokens

LEAST = 1e-7
"""Smallest probability that counts of all tokens outside the teacher's: fp32 cannot tell it from 0."""


def distillation(tokens: Tokens, spec: DistillationLoss) -> Terms:
    """Σ_v p(v)·(log p(v) − log q(v)) over the k tokens and the rest; (p, q) = (teacher, π), or (π, teacher) in reverse.

    Merging events never increases a divergence (data processing), so this is a lower bound of the whole one.
    """
    if tokens.teacher is None:
        raise MissingInput("teacher: expected logprobs of its most likely tokens, found none")
    teacher, student = tokens.teacher.logprobs, tokens.teacher.student
    if not tokens.teacher.complete:
        teacher, student = _with_rest(teacher), _with_rest(student)
    p, q = (teacher, student) if spec.divergence == "Forward" else (student, teacher)
    loss = (p.exp() * (p - q)).sum(-1)
    return Terms(loss, kl=loss.detach())


def _with_rest(logprobs: Tensor) -> Tensor:
    """`[n, k]` → `[n, k + 1]`: the last is the log-probability of everything else."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([logprobs, rest], dim=-1)
