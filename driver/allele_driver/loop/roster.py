"""Members of a run and the part that trains each: who takes a turn in a step, and on what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from allele.api.run import RLRunSpec
from allele_driver import algorithms, cohorts
from allele_driver.cohorts import cohort, saves_state
from allele_driver.loop.rollout import ActivePart, Draw, Roller
from allele_driver.loop.stages import Stages
from allele_driver.loop.train import Turn
from allele_driver.members import Member
from allele_driver.recipes import Recipe
from allele_driver.rollouts import Rollouts, joined
from allele_driver.schedule import learning_rate


class Roster:
    """The parts of a run, seen as one list of members."""

    def __init__(self, active: Sequence[ActivePart], spec: RLRunSpec) -> None:
        self.active = tuple(active)
        self.members: tuple[Member, ...] = tuple(m for a in active for m in a.part.members)
        self._spec = spec
        self._part = {m.name: i for i, a in enumerate(active) for m in a.part.members}
        self._place = {m.name: i for i, m in enumerate(self.members)}

    def part(self, member: str) -> ActivePart:
        return self.active[self._part[member]]

    def share(self, part: int, members: Sequence[Member]) -> list[Member]:
        """Those of `members` that belong to a part."""
        return [m for m in members if self._part[m.name] == part]

    def cohort(self, step: int, *, ready: Collection[str]) -> list[Member]:
        """Who trains in a step, out of those that are ready."""
        return [m for m in cohort(self.members, step=step, size=self._spec.pace.cohort) if m.name in ready]

    def sampled(self, step: int, *, ready: Collection[str]) -> list[Member]:
        """Of these, whose revisions gateways will be asked for."""
        return [m for m in self.cohort(step, ready=ready) if not self.part(m.name).reads]

    def recipe(self, member: str) -> Recipe:
        return self.part(member).recipes[member]

    def turns(self, step: int, rollouts: Rollouts, *, done: Mapping[str, int]) -> list[Turn]:
        """What each member trains on; those with nothing that tells are left out. `done`: its own steps so far."""
        found = []
        for name in rollouts.members:
            recipe, sampling = self.recipe(name), self.part(name).spec.sampling
            rows = rollouts.given.get(name) or algorithms.rows(rollouts.of(name), recipe.algorithm, sampling)
            if not rows:
                continue
            found.append(
                Turn(
                    name,
                    self._part[name],
                    algorithms.loss_spec(recipe.algorithm, sampling),
                    tuple(rows),
                    own_step=done.get(name, 0) + 1,
                    learning_rate=self._rate(name, own_step=done.get(name, 0) + 1),
                    saves_state=self._saves(name, step),
                )
            )
        return found

    def _rate(self, member: str, *, own_step: int) -> float:
        optimizer = self.recipe(member).optimizer
        turns = cohorts.turns(
            self._place[member],
            members=len(self.members),
            step=self._spec.stop.steps,
            size=self._spec.pace.cohort,
        )
        return learning_rate(optimizer, step=own_step, horizon=optimizer.horizon or turns)

    def _saves(self, member: str, step: int) -> bool:
        return saves_state(
            self._place[member],
            members=len(self.members),
            step=step,
            steps=self._spec.stop.steps,
            size=self._spec.pace.cohort,
            every=self._spec.checkpoints.every_steps,
        )

    async def to_train_on(
        self,
        roller: Roller,
        members: Sequence[Member],
        *,
        step: int,
        revisions: Mapping[str, int],
        version: int,
        stages: Stages,
    ) -> Rollouts:
        """Answers and pairs where the algorithm learns from such; else rollouts, with refills for what says nothing."""
        reads = [a.reads for a in self.active]
        asked = [
            roller.given(a, self.share(i, members), salt=str(step), stages=stages)
            for i, a in enumerate(self.active)
            if reads[i]
        ]
        left = {m.name: m for m in members if not reads[self._part[m.name]]}
        missing = {name: self.part(name).spec.algorithm.prompts_per_step for name in left}
        found = list(await asyncio.gather(*asked))
        round_ = 0
        while missing:
            some = await self.roll_out(
                roller,
                [left[name] for name in missing],
                draw=_draw(missing, self._part, salt=str(step) if round_ == 0 else f"{step}/{round_}", of=self.active),
                revisions=revisions,
                version=version,
                stages=stages,
            )
            found.append(some)
            round_ += 1
            missing = self._untold(joined(found), missing, round_=round_)
        return joined(found)

    def _untold(self, rollouts: Rollouts, asked: Collection[str], *, round_: int) -> dict[str, int]:
        """Member → prompts to draw in refill `round_`, those for members that still lack some and may have more."""
        missing: dict[str, int] = {}
        for name in asked:
            algorithm = self.part(name).spec.algorithm
            telling = sum(algorithms.tells(g, algorithm) for g in rollouts.of(name))
            if round_ <= algorithms.refills(algorithm) and telling < algorithm.prompts_per_step:
                missing[name] = algorithm.prompts_per_step - telling
        return missing

    async def roll_out(
        self,
        roller: Roller,
        members: Sequence[Member],
        *,
        draw: Callable[[ActivePart], Draw],
        revisions: Mapping[str, int],
        version: int,
        stages: Stages,
    ) -> Rollouts:
        """Rollouts of members, each with its part's environment, all parts at once."""
        shares = [(a, self.share(i, members)) for i, a in enumerate(self.active)]
        found = await asyncio.gather(
            *(
                roller.roll_out(a, share, draw=draw(a), revisions=revisions, version=version, stages=stages)
                for a, share in shares
                if share
            )
        )
        return joined(found)


def _draw(
    missing: Mapping[str, int], part_of: Mapping[str, int], *, salt: str, of: Sequence[ActivePart]
) -> Callable[[ActivePart], Draw]:
    """For each part, as many prompts of each member as the one that lacks most."""
    most: dict[int, int] = {}
    for name, n in missing.items():
        most[part_of[name]] = max(most.get(part_of[name], 0), n)
    by_part = {id(a): most[i] for i, a in enumerate(of) if i in most}
    return lambda a: Draw(by_part[id(a)], a.spec.algorithm.samples, held_out=False, salt=salt)
