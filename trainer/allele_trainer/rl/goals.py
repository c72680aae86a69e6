"""What each row is trained towards: its loss, what it counts, and the numbers that came with it.

Made from a member's rows in the whole command, before they are split into micro-batches or over ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from allele.protocol.losses import DistillationLoss, LossSpec, PolicyLoss, PreferenceLoss
from allele_trainer.rl.rewards import whitened
from allele_trainer.rl.samples import MemberSample
from allele_trainer.rl.weights import row_weights

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A teacher's most likely tokens at each of n places: `[n, k]` each."""

    ids: Ints
    logprobs: Floats


@dataclasses.dataclass(frozen=True)
class Goal:
    """Of one row with n completion tokens; arrays are `[n]`. `weight`: what each token's value counts."""

    loss: LossSpec
    weight: float
    rollout: Floats | None = None
    advantages: Floats | None = None
    reference: Floats | None = None
    lesson: Lesson | None = None
    teacher_prompt: Sequence[int] | None = None

    @property
    def wants_reference(self) -> bool:
        """Whether the base's logprobs of the completion are needed and not there."""
        return self.reference is None and compares_with_base(self.loss)

    @property
    def wants_lesson(self) -> bool:
        """Whether the base has to teach."""
        return self.lesson is None and isinstance(self.loss, DistillationLoss)

    @property
    def finite(self) -> bool:
        """Whether all numbers are: some that are not (a logprob of ∞) would give a finite gradient."""
        lesson = None if self.lesson is None else self.lesson.logprobs
        found = (self.rollout, self.advantages, self.reference, lesson)
        return all(bool(np.isfinite(a).all()) for a in found if a is not None)


def compares_with_base(loss: LossSpec) -> bool:
    """Whether a loss needs a reference policy's logprobs."""
    return isinstance(loss, PreferenceLoss) or (isinstance(loss, PolicyLoss) and loss.kl is not None)


def penalises_rewards(loss: LossSpec) -> bool:
    """Whether advantages depend on the base's logprobs of all of a member's rows."""
    return isinstance(loss, PolicyLoss) and loss.kl is not None and loss.kl.estimator == "K1"


def goals(samples: Sequence[MemberSample], loss: LossSpec, *, references: Sequence[Floats] | None = None) -> list[Goal]:
    """Of all rows of one member in a command. `references`: the base's logprobs, for `penalises_rewards`."""
    weights = row_weights([len(s.completion) for s in samples], loss)
    if isinstance(loss, PolicyLoss):
        return _policy_goals(samples, loss, weights, references)
    if isinstance(loss, PreferenceLoss):
        return [Goal(loss, w, reference=_floats(s.reference)) for s, w in zip(samples, weights, strict=True)]
    if isinstance(loss, DistillationLoss):
        return [
            Goal(loss, w, lesson=_lesson(s), teacher_prompt=s.teacher_prompt)
            for s, w in zip(samples, weights, strict=True)
        ]
    return [Goal(loss, w) for w in weights]


def _policy_goals(
    samples: Sequence[MemberSample], loss: PolicyLoss, weights: Sequence[float], references: Sequence[Floats] | None
) -> list[Goal]:
    rollouts = [np.array(s.logprobs, np.float32) for s in samples]
    lengths = [len(s.completion) for s in samples]
    rewards = [s.advantage if s.advantage is not None else np.nan for s in samples]
    if loss.whiten:
        distances = None
        if references is not None:
            distances = [r - b for r, b in zip(rollouts, references, strict=True)]
        beta = loss.kl.coefficient if loss.kl is not None else 0.0
        every = whitened(rewards, lengths, distances=distances, coefficient=beta)
        advantages = [a.astype(np.float32) for a in every]
    else:
        advantages = [np.full(n, r, np.float32) for r, n in zip(rewards, lengths, strict=True)]
    return [
        Goal(loss, w, rollout=r, advantages=a, reference=None if references is None else references[i])
        for i, (w, r, a) in enumerate(zip(weights, rollouts, advantages, strict=True))
    ]


def _lesson(sample: MemberSample) -> Lesson | None:
    if sample.teacher_ids is None:
        return None
    places = len(sample.completion)
    ids, logprobs = np.array(sample.teacher_ids, np.int64), np.array(sample.teacher_logprobs, np.float32)
    return Lesson(ids.reshape(places, -1), logprobs.reshape(places, -1))


def _floats(values: Sequence[float] | None) -> Floats | None:
    return None if values is None else np.array(values, np.float32)
