"""The scalar of one micro-batch whose samples may each have another loss, and what its tokens add up to."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from allele.protocol.losses import LossSpec
from allele_trainer.model.distribution import Distribution
from allele_trainer.rl.goals import Goal
from allele_trainer.rl.losses import LOSSES, Sequences, Teacher, Tokens
from allele_trainer.rl.packing import Packed
from allele_trainer.rl.sums import Columns, Sums, sums_of


@dataclasses.dataclass
class _Alike:
    """Samples of a micro-batch with the same loss, in its order: owner, first target, number of targets and goal."""

    owners: list[int] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    goals: list[Goal] = dataclasses.field(default_factory=list)

    def places(self) -> npt.NDArray[np.int64]:
        """`[m]` of their targets among all of the micro-batch."""
        lengths = np.array(self.lengths)
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(np.array(self.starts) - (ends - lengths), lengths)

    def weights(self) -> npt.NDArray[np.float32]:
        """`[m]` what each token counts."""
        return np.repeat(np.array([g.weight for g in self.goals], np.float32), self.lengths)


def objective(packed: Packed, targets: Tensor, distribution: Distribution) -> tuple[Tensor, dict[int, Sums]]:
    """Σ value · weight over the `targets` `[n]` of samples with goals; sums by owner.

    Losses are computed one after the other over the tokens of the members that have them: no number of one member
    meets that of another but in the last sum, whose parts have their own gradients.
    """
    logprobs, entropy, unknown = distribution.at(targets), distribution.entropy, packed.unknown
    if unknown is not None:
        # Tokens that were routed otherwise than in the rollout count for nothing, in ratios of sequences neither.
        logprobs = torch.where(torch.as_tensor(unknown).to(targets.device), logprobs.detach(), logprobs)
    by_loss = _by_loss(packed)
    values: list[Tensor] = []
    sums: dict[int, Sums] = {}
    for loss, some in by_loss.items():
        places = some.places() if len(by_loss) > 1 else None
        rows = None if places is None else torch.as_tensor(places).to(targets.device)
        weights = some.weights()
        if unknown is not None:
            weights[unknown if places is None else unknown[places]] = 0
        tokens = _tokens(some, logprobs, distribution, rows)
        terms = LOSSES[loss.kind](tokens, loss)
        weight = torch.as_tensor(weights).to(targets.device)
        weighted = terms.loss * weight
        values.append(weighted.sum())
        columns = Columns(weighted, weight, _rows(entropy, rows))
        sums.update(sums_of(tokens, terms, columns, owners=some.owners, lengths=some.lengths))
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
    return Tokens(
        _rows(logprobs, rows),
        Sequences(some.lengths, logprobs.dtype, device),
        rollout=joined([g.rollout for g in goals]),
        advantages=joined([g.advantages for g in goals]),
        reference=joined([g.reference for g in goals]),
        teacher=teacher,
    )
