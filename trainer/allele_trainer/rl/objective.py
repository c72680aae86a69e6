"""The scalar of one micro-batch whose samples may each have another loss, and what its tokens add up to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from allele.protocol.losses import LossSpec
from allele_trainer.model.distribution import Distribution
from allele_trainer.rl.goals import Goal
from allele_trainer.rl.losses import LOSSES, Sequences, Teacher, Tokens
from allele_trainer.rl.packing import Packed, Sample
from allele_trainer.rl.sums import Sums, sums_of


def objective(packed: Packed, targets: Tensor, distribution: Distribution) -> tuple[Tensor, dict[int, Sums]]:
    """Σ value · weight over the `targets` `[n]` of samples with goals; sums by slot.

    Losses are computed one after the other over the tokens of the members that have them: no number of one member
    meets that of another but in the last sum, whose parts have their own gradients.
    """
    unknown = torch.as_tensor(packed.unknown).to(targets.device)
    found = distribution.at(targets)
    # Tokens that were routed otherwise than in the rollout count for nothing, in ratios of sequences neither.
    logprobs = torch.where(unknown, found.detach(), found)
    by_loss: dict[LossSpec, list[tuple[Sample, Goal, int]]] = {}
    start = 0
    for sample in packed.samples:
        assert sample.goal is not None, "trained samples have goals"
        by_loss.setdefault(sample.goal.loss, []).append((sample, sample.goal, start))
        start += len(sample.completion)
    total = logprobs[:0].sum()  # of the graph, also where there is no sample
    sums: dict[int, Sums] = {}
    for loss, some in by_loss.items():
        rows = _rows(some).to(targets.device)
        tokens = _tokens([goal for _, goal, _ in some], _lengths(some), logprobs, distribution, rows)
        terms = LOSSES[loss.kind](tokens, loss)
        weight = (
            _spread([goal.weight for _, goal, _ in some], _lengths(some))
            .to(logprobs)
            .masked_fill(unknown.index_select(0, rows), 0.0)
        )
        owners = np.repeat([s.slot for s, _, _ in some], _lengths(some)).tolist()
        sums.update(
            sums_of(tokens, terms, weight=weight, entropy=distribution.entropy.index_select(0, rows), owners=owners)
        )
        total = total + (terms.loss * weight).sum()
    return total, sums


def _lengths(some: Sequence[tuple[Sample, Goal, int]]) -> list[int]:
    return [len(s.completion) for s, _, _ in some]


def _rows(some: Sequence[tuple[Sample, Goal, int]]) -> Tensor:
    """`[m]` places of these samples' tokens among all targets."""
    return torch.cat([torch.arange(start, start + len(s.completion)) for s, _, start in some])


def _spread(values: Sequence[float], lengths: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))


def _tokens(
    goals: Sequence[Goal], lengths: Sequence[int], logprobs: Tensor, distribution: Distribution, rows: Tensor
) -> Tokens:
    """All of these goals have the same loss, and so the same kinds of numbers."""
    device = logprobs.device

    def joined(parts: list[np.ndarray | None]) -> Tensor | None:
        there = [p for p in parts if p is not None]
        return torch.as_tensor(np.concatenate(there)).to(device) if len(there) == len(parts) else None

    ids = joined([g.lesson.ids if g.lesson else None for g in goals])
    lesson = joined([g.lesson.logprobs if g.lesson else None for g in goals])
    teacher = None
    if ids is not None and lesson is not None:
        complete = ids.shape[1] == distribution.vocab
        teacher = Teacher(lesson, distribution.at(ids, rows=rows), complete)
    counts = torch.tensor(lengths)
    return Tokens(
        logprobs.index_select(0, rows),
        Sequences(torch.repeat_interleave(torch.arange(len(lengths)), counts).to(device), counts.to(logprobs)),
        rollout=joined([g.rollout for g in goals]),
        advantages=joined([g.advantages for g in goals]),
        reference=joined([g.reference for g in goals]),
        teacher=teacher,
    )
