"""The scalar of one micro-batch whose samples may each have another loss, and what its tokens add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from allele.protocol.losses import LossSpec
from allele_trainer.model.distribution import Distribution
from allele_trainer.rl.goals import Goal
from allele_trainer.rl.losses import LOSSES, Sequences, Teacher, Tokens
from allele_trainer.rl.packing import Packed
from allele_trainer.rl.sums import Sums, sums_of


@dataclasses.dataclass
class _Alike:
    """Samples of a micro-batch with the same loss, in its order: owner, first target, number of targets and goal."""

    owners: list[int] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    goals: list[Goal] = dataclasses.field(default_factory=list)

    def rows(self) -> npt.NDArray[np.int64]:
        """`[m]` places of their targets among all of the micro-batch."""
        lengths = np.array(self.lengths)
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(np.array(self.starts) - (ends - lengths), lengths)

    def spread(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """A value of each sample → `[m]`."""
        return np.repeat(np.array(values, np.float64), self.lengths)


def objective(packed: Packed, targets: Tensor, distribution: Distribution) -> tuple[Tensor, dict[int, Sums]]:
    """Σ value · weight over the `targets` `[n]` of samples with goals; sums by owner.

    Losses are computed one after the other over the tokens of the members that have them: no number of one member
    meets that of another but in the last sum, whose parts have their own gradients.
    """
    logprobs, entropy = distribution.at(targets), distribution.entropy
    known = np.where(packed.unknown, 0.0, 1.0)
    if packed.unknown.any():
        # Tokens that were routed otherwise than in the rollout count for nothing, in ratios of sequences neither.
        logprobs = torch.where(torch.as_tensor(packed.unknown).to(targets.device), logprobs.detach(), logprobs)
    by_loss = _by_loss(packed)
    values: list[Tensor] = []
    sums: dict[int, Sums] = {}
    for loss, some in by_loss.items():
        places = some.rows()
        rows = torch.as_tensor(places).to(targets.device) if len(by_loss) > 1 else None
        tokens = _tokens(some, logprobs, distribution, rows)
        terms = LOSSES[loss.kind](tokens, loss)
        weight = torch.as_tensor(some.spread([g.weight for g in some.goals]) * known[places]).to(logprobs)
        owners = np.repeat(some.owners, some.lengths)
        sums.update(sums_of(tokens, terms, weight=weight, entropy=_rows(entropy, rows), owners=owners))
        values.append((terms.loss * weight).sum())
    total = torch.stack(values).sum() if values else logprobs.sum()  # of the graph, also where there is no sample
    return total, sums


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """None: all of them."""
    return values if rows is None else values.index_select(0, rows)


def _by_loss(packed: Packed) -> dict[LossSpec, _Alike]:
    found: dict[LossSpec, _Alike] = {}
    start = 0
    for sample in packed.samples:
        assert sample.goal is not None, "trained samples have goals"
        some = found.setdefault(sample.goal.loss, _Alike())
        length = len(sample.completion)
        some.owners.append(sample.owner)
        some.starts.append(start)
        some.lengths.append(length)
        some.goals.append(sample.goal)
        start += length
    return found


def _tokens(some: _Alike, logprobs: Tensor, distribution: Distribution, rows: Tensor | None) -> Tokens:
    """What the loss is given: goals of one loss have the same kinds of numbers."""
    device, goals = logprobs.device, some.goals

    def joined(parts: list[npt.NDArray[np.float32] | None]) -> Tensor | None:
        there = [p for p in parts if p is not None]
        return torch.as_tensor(np.concatenate(there)).to(device) if len(there) == len(parts) else None

    lessons = [g.lesson for g in goals if g.lesson is not None]
    teacher = None
    if len(lessons) == len(goals):
        ids = torch.as_tensor(np.concatenate([lesson.ids for lesson in lessons])).to(device)
        taught = torch.as_tensor(np.concatenate([lesson.logprobs for lesson in lessons])).to(device)
        teacher = Teacher(taught, distribution.at(ids, rows=rows), complete=ids.shape[1] == distribution.vocab)
    lengths = torch.tensor(some.lengths)
    index = torch.repeat_interleave(torch.arange(len(goals)), lengths).to(device)
    return Tokens(
        _rows(logprobs, rows),
        Sequences(index, lengths.to(logprobs)),
        rollout=joined([g.rollout for g in goals]),
        advantages=joined([g.advantages for g in goals]),
        reference=joined([g.reference for g in goals]),
        teacher=teacher,
    )
