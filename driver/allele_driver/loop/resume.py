"""Where each member starts, from what the catalogue says: pure.

The trainer's memory is never trusted across a restart of either side: rows come back from the last commit with state,
and committed revisions of this run after it belong to a branch that is not gone on with.
"""

from __future__ import annotations

import dataclasses

from allele.api.run import Optimizer, StartFrom
from allele.protocol.commands import ByteRange, MemberStart, OptimizerSpec
from allele.store import Fact, Index
from allele_driver.members import Member


@dataclasses.dataclass(frozen=True)
class StartPoint:
    """`revision` None: the member begins at its initialisation and needs a first revision."""

    member: Member
    revision: int | None = None
    state: ByteRange | None = None
    weights: ByteRange | None = None
    abandoned: tuple[int, ...] = ()
    """Revisions of this run that are later than `revision`."""

    def command(self, optimizer: OptimizerSpec) -> MemberStart:
        """As the trainer wants it."""
        return MemberStart(
            member=self.member.name,
            adapter=self.member.adapter,
            optimizer=optimizer,
            seed=self.member.seed,
            state=self.state,
            weights=self.weights,
        )


def start_point(member: Member, index: Index, *, run: str, start_from: StartFrom) -> StartPoint:
    """The newest revision of this run that has a state; before there is one, what `start_from` says."""
    own = index.resume_point([member.name], run=run).get(member.name)
    if own is not None:
        assert own.revision is not None, "committed facts have a revision"
        return StartPoint(
            member, own.revision, state=own.state, abandoned=_standing_of(index, member.name, run, after=own.revision)
        )
    abandoned = _standing_of(index, member.name, run, after=0)
    chosen = None if start_from.revision == "Base" else _foreign(index, member.name, run, start_from)
    if chosen is None:
        return StartPoint(member, abandoned=abandoned)
    resumes = start_from.optimizer == "Resume" and chosen.state is not None
    return StartPoint(
        member,
        chosen.revision,
        state=chosen.state if resumes else None,
        weights=None if resumes else chosen.weights,
        abandoned=abandoned,
    )


def _standing_of(index: Index, member: str, run: str, *, after: int) -> tuple[int, ...]:
    """Revisions of a run with a number above `after` that nobody has abandoned or retired yet."""
    found = []
    for revision in range(after + 1, index.next_revision(member)):
        fact = index.get(member, revision)
        if fact is not None and fact.run == run and not index.is_abandoned(member, revision):
            found.append(revision)
    return tuple(found)


def _foreign(index: Index, member: str, run: str, start_from: StartFrom) -> Fact | None:
    """What another run left: its newest or its exposed revision; without an exposed one, the newest."""
    fact = index.exposed(member) if start_from.revision == "Exposed" else None
    fact = fact or index.newest(member)
    while fact is not None and fact.run == run:
        fact = index.get(member, fact.parent) if fact.parent is not None else None
    return fact


def unexposed(member: str, revision: int, index: Index) -> bool:
    """Whether a revision waits for its exposure: trained, with a probe, and not what is served."""
    fact, served = index.get(member, revision), index.exposed(member)
    return (
        fact is not None
        and fact.parent is not None
        and bool(fact.probe)
        and (served is None or served.revision != revision)
        and index.hold(member) is None
    )


def optimizer_spec(optimizer: Optimizer) -> OptimizerSpec:
    """The trainer's part of a run's optimizer."""
    return OptimizerSpec(
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
    )
