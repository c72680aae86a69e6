"""Members of a run and the part that trains each: who takes a turn in a step, and on what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from allele.api.run import RLRunSpec
from allele_driver.cohorts import cohort, saves_state
from allele_driver.loop.record import loss_spec
from allele_driver.loop.rollout import ActivePart, Draw, Roller
from allele_driver.loop.stages import Stages
from allele_driver.loop.train import Turn
from allele_driver.members import Member
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

    def wanted(self, member: str) -> int:
        """Samples of a member in one step."""
        algorithm = self.part(member).spec.algorithm
        return algorithm.prompts_per_step * algorithm.group_size

    def turns(self, step: int, rollouts: Rollouts) -> list[Turn]:
        """What each member trains on; without a telling group, none."""
        steps, size = self._spec.stop.steps, self._spec.pace.cohort
        turns = []
        for name in dict.fromkeys(g.member for g in rollouts.groups):
            rows = tuple(row for g in rollouts.of(name) for row in g.train_rows())
            if not rows:
                continue
            active = self.part(name)
            saves = saves_state(
                self._place[name],
                members=len(self.members),
                step=step,
                steps=steps,
                size=size,
                every=self._spec.checkpoints.every_steps,
            )
            rate = learning_rate(active.spec.optimizer, step=step, steps=steps)
            turns.append(Turn(name, self._part[name], loss_spec(active), rows, rate, saves))
        return turns

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
