"""One forward_backward while it is executed: its units, and what each member's tokens have added up to.

A command is validated whole before any of it runs; after that its units may share micro-batches with those of other
runs, and take turns with them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

from allele.protocol import commands as c
from allele.protocol.losses import LossSpec
from allele_trainer.bank.table import Key, PageTable
from allele_trainer.rl.goals import Floats, Goal, goals, penalises_rewards
from allele_trainer.rl.packing import units_of
from allele_trainer.rl.samples import MemberSample
from allele_trainer.rl.sums import Sums
from allele_trainer.server.shares import Unit


@dataclasses.dataclass(frozen=True)
class Part:
    """Sequences of one member that go through a micro-batch together."""

    work: Work
    key: Key
    table: PageTable
    samples: Sequence[MemberSample]
    rows: range
    """Places of the samples among the member's own in the command."""

    def goals(self) -> Iterator[Goal]:
        """Of each sample; once the member's are made."""
        made = self.work.goals[self.key.member]
        return (made[row] for row in self.rows)


@dataclasses.dataclass(eq=False)
class Work:
    """`goals`: of each member's samples. Those that go by what the base says of all of them are made by `learn`."""

    header: c.Header
    losses: Mapping[str, LossSpec]
    """By member."""
    samples: Mapping[str, Sequence[MemberSample]]
    goals: dict[str, list[Goal]]
    sums: dict[str, Sums]
    units: list[Unit[Part]]
    mode: c.Mode = "Batched"
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def done(self) -> c.ForwardBackwardDone:
        return c.ForwardBackwardDone(
            members={m: s.report(self.losses[m]) for m, s in self.sums.items()},
            seconds=time.perf_counter() - self.began,
            mode=self.mode,
        )

    def learn(self, member: str, references: Sequence[Floats]) -> None:
        """Make a member's goals, given the base's logprobs of each of its completions."""
        self.goals[member] = goals(self.samples[member], self.losses[member], references=references)


def work_of(
    command: c.ForwardBackward, samples: Sequence[MemberSample], tables: Mapping[str, PageTable], *, max_tokens: int
) -> Work:
    """Cut a command into units, first ones of all members first."""
    by_member: dict[str, list[MemberSample]] = {}
    for sample in samples:
        by_member.setdefault(sample.member, []).append(sample)
    losses = {m: command.losses[some[0].loss] for m, some in by_member.items()}
    made = {m: goals(some, losses[m]) for m, some in by_member.items() if not penalises_rewards(losses[m])}
    work = Work(command.header, losses, by_member, made, {m: Sums() for m in by_member}, [])
    cut = {m: units_of(some, max_tokens=max_tokens) for m, some in by_member.items()}
    first = dict.fromkeys(cut, 0)
    for number in range(max((len(units) for units in cut.values()), default=0)):
        for member, units in cut.items():
            if number < len(units):
                key, unit = Key(command.header.run, member), units[number]
                rows = range(first[member], first[member] + len(unit))
                first[member] = rows.stop
                part = Part(work, key, tables[member], unit, rows)
                work.units.append(Unit(key, id(part.table), sum(s.inputs for s in unit), part))
    return work
