"""Samples on their way from an engine to the trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from allele_driver.advantages import usable
from allele_driver.environments import Lesson, Prompt


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One completion, exactly as the engine returned it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """One row of `allele.protocol.samples.TRAIN`."""

    member: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    advantage: float | None = None
    pair: int | None = None
    reference: tuple[float, ...] | None = None
    teacher_prompt: tuple[int, ...] | None = None
    teacher_ids: tuple[int, ...] | None = None
    teacher_logprobs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PromptGroup:
    """Samples of one prompt under one revision; a reward or a lesson is None where the sample was dropped."""

    member: str
    revision: int | None
    prompt: Prompt
    drawn: tuple[Drawn, ...]
    rewards: tuple[float | None, ...]
    lessons: tuple[Lesson | None, ...] = ()
    """What the environment taught about each sample; empty when it was not asked."""

    def kept_rewards(self) -> list[float]:
        return [r for r in self.rewards if usable(r)]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What there is to train on in a step, or in a part of it."""

    groups: tuple[PromptGroup, ...] = ()
    given: dict[str, tuple[TrainRow, ...]] = dataclasses.field(default_factory=dict)
    """Member → answers or pairs that its environment gave: nothing was sampled for them."""
    wanted: dict[str, int] = dataclasses.field(default_factory=dict)
    """Member → samples, answers or pairs that were asked for."""
    dropped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Member → reason (raised, hung, not finite, sampling) → samples."""

    @functools.cached_property
    def _by_member(self) -> dict[str, list[PromptGroup]]:
        found: dict[str, list[PromptGroup]] = {}
        for g in self.groups:
            found.setdefault(g.member, []).append(g)
        return found

    @property
    def members(self) -> list[str]:
        """Those with something to train on."""
        return [*self._by_member, *(m for m in self.given if m not in self._by_member)]

    def of(self, member: str) -> list[PromptGroup]:
        return self._by_member.get(member, [])

    def prompts(self, member: str) -> int:
        """That were sampled, or given with an answer or a pair."""
        given = self.given.get(member, ())
        pairs = {r.pair for r in given if r.pair is not None}
        return len(self.of(member)) + (len(pairs) if pairs else len(given))

    def mean_rewards(self) -> dict[str, float]:
        """By member, of samples that were scored; members without any are left out."""
        rewards = {m: [r for g in groups for r in g.kept_rewards()] for m, groups in self._by_member.items()}
        return {m: sum(r) / len(r) for m, r in rewards.items() if r}


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """All of them as one; what a member has in several adds up."""
    given: dict[str, tuple[TrainRow, ...]] = {}
    wanted: dict[str, int] = {}
    dropped: dict[str, dict[str, int]] = {}
    for p in parts:
        for member, rows in p.given.items():
            given[member] = given.get(member, ()) + rows
        for member, n in p.wanted.items():
            wanted[member] = wanted.get(member, 0) + n
        for member, reasons in p.dropped.items():
            sums = dropped.setdefault(member, {})
            for reason, n in reasons.items():
                sums[reason] = sums.get(reason, 0) + n
    return Rollouts(tuple(g for p in parts for g in p.groups), given, wanted, dropped)
