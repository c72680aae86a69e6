"""What the base says of samples: the model with adapters off is the reference policy and a teacher, for one forward.

No second model is loaded: the same frozen weights run without a plan, and without gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from allele.protocol.losses import DistillationLoss
from allele_trainer.model.batch import PackedBatch, to_device
from allele_trainer.model.build import BaseModel
from allele_trainer.model.distribution import Distribution
from allele_trainer.rl.goals import Goal, Lesson
from allele_trainer.rl.packing import Packed, Sample, pack


def asks(sample: Sample) -> bool:
    """Whether a sample's goal lacks what only the base can say."""
    return sample.goal is not None and (sample.goal.wants_reference or sample.goal.wants_lesson)


def with_base(model: BaseModel, parts: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The same samples with what their goals want of the base; collective over the ranks of all stages.

    Ranks that exchange tokens for experts give the same number of parts. In a pipeline only the last stage, where
    losses are computed, gets answers.
    """
    found: list[Goal] = []

    def keep(item: Packed, batch: PackedBatch, distribution: Distribution) -> Tensor:
        found.extend(_answers(item, distribution.at(batch.targets), distribution))
        return distribution.normaliser.sum()

    def prepare(item: Packed) -> PackedBatch:
        return to_device(item, plan=None, device=model.device)

    questions = [[_seen(s) for s in part if asks(s)] for part in parts]
    packed = [pack(some) for some in questions if some or model.ranks.layout.ep > 1]
    model.run(packed, prepare=prepare, loss=keep, backward=False)
    if not model.last_stage:
        return [list(part) for part in parts]
    answers = iter(found)
    return [[dataclasses.replace(s, goal=next(answers)) if asks(s) else s for s in part] for part in parts]


def _seen(sample: Sample) -> Sample:
    """As the base sees it: as a teacher it may have a prompt of its own; the completion is the same."""
    own = sample.goal.teacher_prompt if sample.goal is not None else None
    return sample if own is None else dataclasses.replace(sample, prompt=own, experts=None)


def _answers(item: Packed, logprobs: Tensor, distribution: Distribution) -> list[Goal]:
    """Goals of the samples of a batch, completed."""
    asked = [s.goal for s in item.samples if s.goal is not None]
    most = max((_top_k(goal) for goal in asked if goal.wants_lesson), default=0)
    ids, lessons = (t.cpu().numpy() for t in distribution.top(most)) if most else (None, None)
    found, start = [], 0
    for sample, goal in zip(item.samples, asked, strict=True):
        rows = slice(start, start + len(sample.completion))
        start = rows.stop
        if goal.wants_lesson and ids is not None and lessons is not None:
            k = _top_k(goal)
            found.append(dataclasses.replace(goal, lesson=Lesson(ids[rows, :k], lessons[rows, :k])))
        else:
            found.append(dataclasses.replace(goal, reference=logprobs[rows].cpu().numpy()))
    return found


def _top_k(goal: Goal) -> int:
    return goal.loss.top_k if isinstance(goal.loss, DistillationLoss) else 0
