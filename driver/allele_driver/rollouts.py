"""Samples on their way from an engine to the trainer."""

from __future__ import annotations

import dataclasses
import functools

from allele_driver.advantages import group_normalised, usable
from allele_driver.environments import Prompt


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
    logprobs: tuple[float, ...]
    advantage: float


@dataclasses.dataclass(frozen=True)
class PromptGroup:
    """Samples of one prompt under one revision; a reward is None where the sample was dropped."""

    member: str
    revision: int | None
    prompt: Prompt
    drawn: tuple[Drawn, ...]
    rewards: tuple[float | None, ...]

    def kept_rewards(self) -> list[float]:
        return [r for r in self.rewards if usable(r)]

    def train_rows(self) -> list[TrainRow]:
        """Empty when the group says nothing about what is better."""
        return [
            TrainRow(self.member, self.prompt.ids, d.ids, d.logprobs, advantage)
            for d, advantage in zip(self.drawn, group_normalised(self.rewards), strict=True)
            if advantage is not None and d.ids
        ]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """All samples of a step, or of a part of it."""

    groups: tuple[PromptGroup, ...] = ()
    dropped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Member → reason (raised, hung, not finite, sampling) → samples."""

    @functools.cached_property
    def _by_member(self) -> dict[str, list[PromptGroup]]:
        found: dict[str, list[PromptGroup]] = {}
        for g in self.groups:
            found.setdefault(g.member, []).append(g)
        return found

    def of(self, member: str) -> list[PromptGroup]:
        return self._by_member.get(member, [])

    def mean_rewards(self) -> dict[str, float]:
        """By member, of samples that were scored; members without any are left out."""
        rewards = {m: [r for g in groups for r in g.kept_rewards()] for m, groups in self._by_member.items()}
        return {m: sum(r) / len(r) for m, r in rewards.items() if r}


def joined(parts: list[Rollouts]) -> Rollouts:
    """Rollouts of disjoint members as one."""
    dropped: dict[str, dict[str, int]] = {}
    for p in parts:
        dropped |= p.dropped
    return Rollouts(tuple(g for p in parts for g in p.groups), dropped)
