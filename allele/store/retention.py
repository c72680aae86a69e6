"""Retention: which revisions, training states and objects of a population are no longer needed, and why. Pure.

Bytes go in two steps, so that a reader which resolved a place before the first still finds it: a fact says that they
may go (Retired; a Committed fact without the state, or with another place), and at least a grace period later the
object is deleted. The grace period must be longer than the longest step of a run, since a trainer writes segments
before the driver commits them, and than any reader holds on to a place.

    facts ─► History of each member ─► kept revisions, kept states ─► Retired facts, Committed facts without state
                                                  │
    objects ──────────────────────────────────────┴─► ranges needed of each object ─► delete, compact
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime, timedelta

import pyarrow as pa

from allele.protocol.commands import ByteRange
from allele.store.facts import Fact
from allele.store.history import History, histories
from allele.store.objects import ObjectInfo

RESUMABLE = 2
"""Newest standing training states of a member that are kept: one to resume from, and the one before it."""

FOLDERS = ("segments", "states", "provenance")
"""Folders of a population whose objects belong to facts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What to keep besides what is exposed, pinned, held, or can be resumed from."""

    keep_last: int = 5
    """Newest standing revisions of each member."""
    every: int = 0
    """Standing revisions whose number is a multiple of this; 0: none."""
    max_policy_lag: int = 1
    """Largest of the runs over the population: samples may still be drawn from a revision this far behind."""
    runs: frozenset[str] = frozenset()
    """Uids of runs that may go on: the state that each would resume from is kept."""
    grace: timedelta = timedelta(hours=24)
    """No revision or object younger than this goes, and bytes stay this long after the fact that says they may go."""
    vacuum: timedelta = timedelta(days=7)
    """Age at which a parquet file that the catalogue does not name is removed, as in Delta's own vacuum; never below
    `grace`. A writer that stood still for longer between writing a file and naming it would damage the catalogue."""


@dataclasses.dataclass(frozen=True)
class Retire:
    """The bytes of a revision may go."""

    fact: Fact
    """The Committed one."""
    reason: str


@dataclasses.dataclass(frozen=True)
class DropState:
    """The training state of a revision may go; its weights stay."""

    fact: Fact
    reason: str


@dataclasses.dataclass(frozen=True)
class Delete:
    """An object that no fact needs."""

    path: str
    size: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Compact:
    """An object of which less than half is needed: what is live in it gets a new place."""

    path: str
    size: int
    ranges: tuple[ByteRange, ...]
    """To be copied, in the order of their offsets."""
    facts: tuple[Fact, ...]
    """Committed facts that name one of them."""

    @property
    def reason(self) -> str:
        return f"{sum(r.length for r in self.ranges)} of {self.size} bytes are needed"


@dataclasses.dataclass(frozen=True)
class Plan:
    retire: tuple[Retire, ...] = ()
    drop: tuple[DropState, ...] = ()
    compact: tuple[Compact, ...] = ()
    delete: tuple[Delete, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.retire or self.drop or self.compact or self.delete)

    def facts(self) -> list[Fact]:
        """What to commit before anything else."""
        retired = (
            Fact(kind="Retired", member=r.fact.member, revision=r.fact.revision, reason=r.reason) for r in self.retire
        )
        return [*retired, *(without_state(d.fact) for d in self.drop)]


def without_state(fact: Fact) -> Fact:
    """The fact as it is said again when its state may go."""
    return dataclasses.replace(fact, state_segment=None, state_offset=None, state_length=None, state_digest=None)


def plan(facts: pa.Table, objects: Iterable[ObjectInfo], *, policy: Policy, now: datetime) -> Plan:
    """`objects` are those of FOLDERS, listed before `facts` were read: what is committed meanwhile is then no garbage.

    Planning again after a plan was carried out gives an empty one, until time passes.
    """
    retire: list[Retire] = []
    drop: list[DropState] = []
    uses = _Uses(policy=policy, now=now)
    for history in histories(facts):
        revisions = kept_revisions(history, policy, now)
        retiring = [r for r in sorted(history.committed) if r not in revisions and r not in history.retired]
        retire += [Retire(history.committed[r], _why_retired(history, r, policy)) for r in retiring]
        states = kept_states(history, policy)
        dropping = [r for r in sorted(revisions) if history.committed[r].state is not None and r not in states]
        drop += [DropState(history.committed[r], f"not among the newest {RESUMABLE} states") for r in dropping]
        uses.add(history, retiring=retiring, dropping=dropping)
    compact, delete = uses.judge(objects)
    return Plan(tuple(retire), tuple(drop), tuple(compact), tuple(delete))


def kept_revisions(history: History, policy: Policy, now: datetime) -> dict[int, str]:
    """Revisions to keep, each with the first reason that applies."""
    standing = history.standing()
    reasons: list[tuple[Iterable[int | None], str]] = [
        ([history.held], "held"),
        (history.exposures[-1:], "exposed"),
        ([history.served_before, *history.exposures[-2:]], "exposed before"),  # gateways fall back to it
        (history.pinned, "pinned"),
        (standing[: policy.max_policy_lag + 2], f"within maxPolicyLag {policy.max_policy_lag} + 1 of the newest"),
        (standing[: policy.keep_last], f"one of the newest {policy.keep_last}"),
        (kept_states(history, policy), "can be resumed from"),
        ([r for r in standing if policy.every and r % policy.every == 0], f"a multiple of {policy.every}"),
        ([r for r, since in history.since.items() if now - since < policy.grace], "younger than the grace period"),
    ]
    kept: dict[int, str] = {}
    for revisions, reason in reasons:
        for r in revisions:
            if r is not None and r in history.committed and r not in history.retired:
                kept.setdefault(r, reason)
    return kept


def kept_states(history: History, policy: Policy) -> set[int]:
    """Revisions whose training state is kept."""
    with_state = [r for r in history.standing() if history.committed[r].state is not None]
    kept = {*with_state[:RESUMABLE], *history.pinned, history.served}
    for run in policy.runs:
        kept.update([r for r in with_state if history.committed[r].run == run][:1])
    return {r for r in kept if r in history.committed and history.committed[r].state is not None}


def _why_retired(history: History, revision: int, policy: Policy) -> str:
    return "abandoned" if revision in history.abandoned else f"not among the newest {policy.keep_last}"


@dataclasses.dataclass(slots=True)
class _Use:
    """What facts say of one object, by offset."""

    live: dict[int, ByteRange] = dataclasses.field(default_factory=dict)
    waiting: dict[int, int] = dataclasses.field(default_factory=dict)
    """Lengths of ranges that are not live but gone for less than the grace period."""
    facts: list[Fact] = dataclasses.field(default_factory=list)
    """Those that name live ranges."""

    @property
    def needed(self) -> int:
        """Bytes."""
        return sum(r.length for r in self.live.values()) + sum(
            length for offset, length in self.waiting.items() if offset not in self.live
        )


class _Uses:
    """Ranges needed of each object, collected member by member."""

    def __init__(self, *, policy: Policy, now: datetime) -> None:
        self._policy = policy
        self._now = now
        self._by_path: dict[str, _Use] = {}
        self._provenance: set[str | None] = set()

    def add(self, history: History, *, retiring: Iterable[int], dropping: Iterable[int]) -> None:
        gone = dict.fromkeys(retiring, self._now) | history.retired
        stateless = set(dropping)
        protected = {history.served, *history.exposures[-1:], *history.pinned}
        for place, since in history.replaced:
            self._past(place, since)
        for revision, fact in history.committed.items():
            self._provenance.add(fact.provenance)
            left = None if revision in protected else gone.get(revision)
            self._present(fact, fact.weights, left)
            self._present(fact, fact.state, self._now if revision in stateless else left)

    def judge(self, objects: Iterable[ObjectInfo]) -> tuple[list[Compact], list[Delete]]:
        compact: list[Compact] = []
        delete: list[Delete] = []
        for info in objects:
            if self._now - info.modified < self._policy.grace or self._is_provenance(info.path):
                continue
            use = self._by_path.get(info.path)
            if use is None:
                delete.append(Delete(info.path, info.size, "no fact names it"))
            elif not use.needed:
                delete.append(
                    Delete(info.path, info.size, f"what it held is retired, dropped or moved for {self._policy.grace}")
                )
            elif use.live and 2 * use.needed < info.size:
                ranges = tuple(use.live[offset] for offset in sorted(use.live))
                compact.append(Compact(info.path, info.size, ranges, tuple(use.facts)))
        return compact, delete

    def _present(self, fact: Fact, place: ByteRange | None, gone: datetime | None) -> None:
        if place is None:
            return
        if gone is not None:
            self._past(place, gone)
            return
        use = self._by_path.setdefault(place.path, _Use())
        use.live[place.offset] = place
        use.facts.append(fact)

    def _past(self, place: ByteRange, since: datetime) -> None:
        """What is let go now waits for a later pass even without a grace period."""
        use = self._by_path.setdefault(place.path, _Use())
        if since >= self._now or self._now - since < self._policy.grace:
            use.waiting[place.offset] = place.length

    def _is_provenance(self, path: str) -> bool:
        folder, _, name = path.partition("/")
        return folder == "provenance" and name.removesuffix(".json") in self._provenance
