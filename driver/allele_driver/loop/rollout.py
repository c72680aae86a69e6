"""Prompts, samples and rewards of some members.

What fails here, fails for one sample or one member: it is counted under its member and reason, and the rest goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

from allele.api.algorithm import TOP_K, Algorithm
from allele.api.run import TrainGroup
from allele.protocol.commands import ProbeSequence
from allele_driver.environments import Lesson, Prompt, Score
from allele_driver.environments.scoring import EnvironmentFailed, Scorer
from allele_driver.loop.stages import Stages
from allele_driver.members import Member, Part, seed_of
from allele_driver.metrics import DROPPED, SAMPLES
from allele_driver.recipes import Recipe, view
from allele_driver.rollouts import Drawn, PromptGroup, Rollouts, TrainRow
from allele_driver.sampling import Ask, Gateways

log = logging.getLogger(__name__)

PROBES = 4
"""Sequences on which every revision is compared; each costs one prefill per exposure and replica."""


@dataclasses.dataclass(frozen=True)
class ActivePart:
    """A part of the run with its environment running."""

    part: Part
    scorer: Scorer
    recipes: Mapping[str, Recipe]
    """By member."""
    probes: tuple[ProbeSequence, ...] = ()

    @property
    def spec(self) -> TrainGroup:
        return self.part.spec

    @property
    def reads(self) -> bool:
        """Whether it learns from answers or pairs that it is given, and samples nothing."""
        return self.spec.algorithm.name in ("SFT", "DPO")


@dataclasses.dataclass(frozen=True)
class Draw:
    """What is wanted of each member."""

    prompts: int
    samples: int
    held_out: bool
    salt: str
    """With run and member, seeds the prompts: the same salt draws the same prompts."""


class Roller:
    """Makes rollouts of a run."""

    def __init__(self, gateways: Gateways, *, run: str, stop: tuple[int, ...], context: int) -> None:
        """`context`: tokens that the base takes at most, a prompt with its completion."""
        self._gateways = gateways
        self._run = run
        self._stop = stop
        self._context = context

    async def roll_out(
        self,
        active: ActivePart,
        members: Sequence[Member],
        *,
        draw: Draw,
        revisions: Mapping[str, int],
        version: int,
        stages: Stages,
    ) -> Rollouts:
        """A member without an entry in `revisions` is sampled from the base."""
        dropped: dict[str, dict[str, int]] = {}
        with stages("prompts"):
            prompts = await self._prompts(active, members, draw, dropped)
        chosen = [(m, p) for m in members for p in prompts.get(m.name, ())]
        asks = [Ask(m.name, revisions.get(m.name), p.ids) for m, p in chosen]
        with stages("generate"):
            drawn = await self._gateways.generate(
                asks, n=draw.samples, sampling=active.spec.sampling, stop=self._stop, version=version
            )
        with stages("score"):
            groups = await self._score(active, chosen, drawn, revisions, dropped)
        if not draw.held_out and (top_k := lessons_of(active.spec.algorithm)):
            with stages("teach"):
                groups = await self._teach(active, groups, dropped, top_k=top_k)
        return Rollouts(groups, wanted={m.name: draw.prompts * draw.samples for m in members}, dropped=dropped)

    async def given(self, active: ActivePart, members: Sequence[Member], *, salt: str, stages: Stages) -> Rollouts:
        """Answers or pairs, promptsPerStep for each member: nothing is sampled."""
        n, pairs = active.spec.algorithm.prompts_per_step, active.spec.algorithm.name == "DPO"
        rows: dict[str, tuple[TrainRow, ...]] = {}
        dropped: dict[str, dict[str, int]] = {}
        with stages("prompts"):
            for m in members:
                seed = seed_of(self._run, salt, m.name)
                try:
                    texts = await active.scorer.given(view(m), seed=seed, n=n, what="pairs" if pairs else "answers")
                except EnvironmentFailed as e:
                    log.warning("%s", e, extra={"member": m.name})
                    _drop(dropped, m.name, "prompts", n)
                    continue
                units = [texts[i : i + 1 + pairs] for i in range(0, len(texts), 1 + pairs)]
                fit = [u for u in units if all(len(t.prompt) + len(t.completion) <= self._context for t in u)]
                if len(fit) < len(units):
                    _drop(dropped, m.name, "too long", len(units) - len(fit))
                rows[m.name] = tuple(
                    TrainRow(m.name, t.prompt, t.completion, pair=i if pairs else None, reference=t.reference or None)
                    for i, unit in enumerate(fit)
                    for t in unit
                )
        return Rollouts(
            given={m: found for m, found in rows.items() if found}, wanted={m.name: n for m in members}, dropped=dropped
        )

    async def probes(self, active: ActivePart) -> tuple[ProbeSequence, ...]:
        """A few prompts of the environment and what the base answers to each."""
        member = active.part.members[0]
        draw = Draw(prompts=PROBES, samples=1, held_out=True, salt="probe")
        prompts = (await self._prompts(active, [member], draw, {})).get(member.name, ())
        if not prompts:
            raise EnvironmentFailed(
                f"prompts of {member.name}: expected {PROBES} to probe with, found none; see the log"
            )
        asks = [Ask(member.name, None, p.ids) for p in prompts]
        drawn = await self._gateways.generate(asks, n=1, sampling=active.spec.sampling, stop=self._stop, version=None)
        return tuple(
            ProbeSequence(prompt=a.prompt, completion=d.ids)
            for a, (d,) in zip(asks, drawn, strict=True)
            if isinstance(d, Drawn) and d.ids
        )

    async def _prompts(
        self, active: ActivePart, members: Sequence[Member], draw: Draw, dropped: dict[str, dict[str, int]]
    ) -> dict[str, tuple[Prompt, ...]]:
        found: dict[str, tuple[Prompt, ...]] = {}
        for m in members:
            seed = seed_of(self._run, draw.salt, m.name)
            try:
                found[m.name] = await active.scorer.prompts(view(m), seed=seed, n=draw.prompts, held_out=draw.held_out)
            except EnvironmentFailed as e:
                log.warning("%s", e, extra={"member": m.name})
                _drop(dropped, m.name, "prompts", draw.prompts * draw.samples)
        return found

    async def _score(
        self,
        active: ActivePart,
        chosen: Sequence[tuple[Member, Prompt]],
        drawn: Sequence[Sequence[Drawn | str]],
        revisions: Mapping[str, int],
        dropped: dict[str, dict[str, int]],
    ) -> tuple[PromptGroup, ...]:
        samples = [(m, p, d) for (m, p), ds in zip(chosen, drawn, strict=True) for d in ds if isinstance(d, Drawn)]
        scores = iter(await active.scorer.scores([(view(m), p, d) for m, p, d in samples]))
        SAMPLES.inc(len(samples))
        groups = []
        for (m, p), ds in zip(chosen, drawn, strict=True):
            kept = tuple(d for d in ds if isinstance(d, Drawn))
            if len(kept) < len(ds):
                log.warning("sampling of %s failed: %s", m.name, next(d for d in ds if isinstance(d, str)))
                _drop(dropped, m.name, "sampling", len(ds) - len(kept))
            rewards = tuple(_reward(next(scores), m.name, dropped) for _ in kept)
            groups.append(PromptGroup(m.name, revisions.get(m.name), p, kept, rewards))
        return tuple(groups)

    async def _teach(
        self,
        active: ActivePart,
        groups: Sequence[PromptGroup],
        dropped: dict[str, dict[str, int]],
        *,
        top_k: int,
    ) -> tuple[PromptGroup, ...]:
        views = {m.name: view(m) for m in active.part.members}
        items = [(views[g.member], g.prompt, d) for g in groups for d in g.drawn]
        found = iter(await active.scorer.lessons(items, top_k=top_k))
        return tuple(
            dataclasses.replace(g, lessons=tuple(_lesson(next(found), g.member, dropped) for _ in g.drawn))
            for g in groups
        )


def lessons_of(algorithm: Algorithm) -> int:
    """Tokens at each place about which the environment is asked to teach; 0: it is not asked."""
    asked = algorithm.name == "Distillation" and algorithm.teacher == "Environment"
    return (algorithm.top_k or TOP_K) if asked else 0


def _reward(score: object, member: str, dropped: dict[str, dict[str, int]]) -> float | None:
    if isinstance(score, Score) and math.isfinite(score.reward):
        return score.reward
    _drop(dropped, member, "not finite" if isinstance(score, Score) else getattr(score, "reason", "raised"), 1)
    return None


def _lesson(lesson: object, member: str, dropped: dict[str, dict[str, int]]) -> Lesson | None:
    if isinstance(lesson, Lesson):
        return lesson
    _drop(dropped, member, getattr(lesson, "reason", "raised"), 1)
    return None


def _drop(dropped: dict[str, dict[str, int]], member: str, reason: str, n: int) -> None:
    DROPPED.labels(reason).inc(n)
    reasons = dropped.setdefault(member, {})
    reasons[reason] = reasons.get(reason, 0) + n
