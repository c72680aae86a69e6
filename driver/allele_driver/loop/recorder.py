"""Turns what a step did into facts, writing the provenance that they name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from allele.protocol.commands import TrainerSetting
from allele.store import Fact
from allele_driver.loop import heldout, record
from allele_driver.loop.ledger import Ledger
from allele_driver.loop.roster import Roster
from allele_driver.loop.train import Exported, Trained, Turn
from allele_driver.members import Member
from allele_driver.rollouts import Rollouts


class Recorder:
    """Facts of one run; they count once they are committed."""

    def __init__(self, origin: record.Origin, ledger: Ledger, roster: Roster) -> None:
        self._origin = origin
        self._ledger = ledger
        self._roster = roster
        self._members = {m.name: m for m in roster.members}
        self.setting: TrainerSetting | None = None
        """What computes, as the trainer said when it was last reset."""

    async def first(
        self,
        part: int,
        members: Sequence[Member],
        exported: Mapping[str, Exported],
        *,
        step: int,
        rewards: Mapping[str, float],
    ) -> list[Fact]:
        """First revisions of members of a part, with their held-out rewards."""
        one = exported[members[0].name]
        origin = record.provenance(
            self._origin,
            self._roster.active[part],
            step=step,
            setting=self.setting,
            shape=one.shape,
            factors=one.factors,
            members=[m.name for m in members],
            prompts=0,
            lags={},
            seconds={},
        )
        sha = await self._ledger.write(origin)
        return [
            record.committed(
                m,
                exported[m.name],
                index=self._ledger.index,
                parent=None,
                provenance=sha,
                metrics=heldout.metrics_of(m.name, rewards),
            )
            for m in members
        ]

    async def step(
        self,
        step: int,
        turns: Sequence[Turn],
        trained: Mapping[str, Trained],
        rollouts: Rollouts,
        *,
        current: Mapping[str, int],
        lags: Mapping[str, Counter[int]],
        seconds: Mapping[str, float],
    ) -> list[Fact]:
        """New revisions of members whose rows changed."""
        facts: list[Fact] = []
        for i, active in enumerate(self._roster.active):
            made = {t.member: e for t in turns if t.part == i and (e := trained[t.member].exported) is not None}
            if not made:
                continue
            one = next(iter(made.values()))
            origin = record.provenance(
                self._origin,
                active,
                step=step,
                setting=self.setting,
                shape=one.shape,
                factors=one.factors,
                members=made.keys(),
                prompts=sum(rollouts.prompts(m) for m in made),
                lags=record.total(lags[m] for m in made),
                seconds=seconds,
            )
            sha = await self._ledger.write(origin)
            facts += [
                record.committed(
                    self._members[t.member],
                    made[t.member],
                    index=self._ledger.index,
                    parent=current[t.member],
                    provenance=sha,
                    metrics=record.step_metrics(t, trained[t.member], rollouts, lag=max(lags[t.member])),
                )
                for t in turns
                if t.member in made
            ]
        return facts
