"""One forward_backward while it is executed: its units, and what each member's tokens have added up to.

A command is validated whole before any of it runs; after that its units may share micro-batches with those of other
runs, and take turns with them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from allele.protocol import commands as c
from allele_trainer.bank.table import Key, PageTable
from allele_trainer.rl.packing import units_of
from allele_trainer.rl.passes import Sums
from allele_trainer.rl.samples import MemberSample
from allele_trainer.server.shares import Unit


@dataclasses.dataclass(frozen=True)
class Part:
    """Sequences of one member that go through a micro-batch together."""

    work: Work
    key: Key
    table: PageTable
    samples: Sequence[MemberSample]


@dataclasses.dataclass(eq=False)
class Work:
    """`weights`: what a token of a member counts in its loss, from the whole command."""

    header: c.Header
    loss: c.LossSpec
    weights: Mapping[str, float]
    sums: dict[str, Sums]
    units: list[Unit[Part]]
    mode: c.Mode = "Batched"
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def done(self) -> c.ForwardBackwardDone:
        return c.ForwardBackwardDone(
            members={m: s.report() for m, s in self.sums.items()},
            seconds=time.perf_counter() - self.began,
            mode=self.mode,
        )


def work_of(
    command: c.ForwardBackward, samples: Sequence[MemberSample], tables: Mapping[str, PageTable], *, max_tokens: int
) -> Work:
    """Cut a command into units, first ones of all members first."""
    by_member: dict[str, list[MemberSample]] = {}
    for sample in samples:
        by_member.setdefault(sample.member, []).append(sample)
    weights = {m: 1.0 / sum(len(s.completion) for s in some) for m, some in by_member.items()}
    work = Work(command.header, command.loss, weights, {m: Sums() for m in by_member}, [])
    cut = {m: units_of(some, max_tokens=max_tokens) for m, some in by_member.items()}
    for number in range(max((len(units) for units in cut.values()), default=0)):
        for member, units in cut.items():
            if number < len(units):
                key = Key(command.header.run, member)
                part = Part(work, key, tables[member], units[number])
                work.units.append(Unit(key, id(part.table), sum(s.inputs for s in units[number]), part))
    return work
