"""Index: what every member is now, in memory, kept up to date by tailing the catalogue.

All answers follow from facts in the order of `Fact.order`, not from the order of arrival, so two replicas that have
seen the same facts answer the same. Facts that it has already applied change nothing.

What the catalogue held at load stays in columns; what came since is held by member, until it is enough to be worth
columns of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence, Set

import pyarrow as pa

from allele.store import heads
from allele.store.catalogue import Catalogue, Changes
from allele.store.columns import Columns, compact
from allele.store.facts import Fact, to_arrow

FOLD_AFTER = 100_000
"""Facts since the load, and at least a quarter of those at it, that are worth columns."""

_BUILT = 4096
"""Members without news that are remembered as they were built from columns."""

Entry = Fact | int
"""A fact, or the place of one in the columns."""


@dataclasses.dataclass(slots=True)
class _Member:
    """The facts of a member that count, by revision in their order; `pinned`: the last Pinned or Unpinned."""

    committed: dict[int, Entry] = dataclasses.field(default_factory=dict)
    exposed: dict[int, Entry] = dataclasses.field(default_factory=dict)
    held: Entry | None = None
    abandoned: set[int] = dataclasses.field(default_factory=set)
    pinned: dict[int, Entry] = dataclasses.field(default_factory=dict)
    retired: set[int] = dataclasses.field(default_factory=set)


class _Known:
    """Everything that an index knows at one moment; replaced whole when facts become columns."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.recent: list[Fact] = []
        self.changed: dict[str, _Member] = {}
        """Members with recent facts."""
        self._built = functools.lru_cache(_BUILT)(self._build)

    def member(self, name: str) -> _Member | None:
        known = self.changed.get(name)
        if known is None and name in self.columns.members:
            known = self._built(name)
        return known

    def fact(self, entry: Entry) -> Fact:
        return entry if isinstance(entry, Fact) else self.columns.fact(entry)

    def apply(self, fact: Fact) -> None:
        known = self.changed.get(fact.member)
        if known is None:
            known = self.changed[fact.member] = self._build(fact.member)
        self.recent.append(fact)
        if fact.kind == "Held":
            if known.held is None or self._order(known.held) <= fact.order:
                known.held = fact
            return
        if fact.revision is None:
            return  # of a kind that a later version knows
        match fact.kind:
            case "Committed":
                known.committed = self._with(known.committed, fact.revision, fact)
            case "Exposed":
                known.exposed = self._with(known.exposed, fact.revision, fact)
            case "Abandoned":
                known.abandoned = known.abandoned | {fact.revision}
            case "Pinned" | "Unpinned":
                known.pinned = self._with(known.pinned, fact.revision, fact)
            case "Retired":
                known.retired = known.retired | {fact.revision}

    def folded(self, *, history: bool) -> _Known:
        """The same, all of it in columns."""
        columns = Columns(pa.concat_tables([self.columns.table, compact(to_arrow(self.recent))]))
        return _Known(columns if history else Columns(heads.select(columns)))

    def _build(self, name: str) -> _Member:
        found = _Member()
        for kind, revision, place in self.columns.of(name):
            match kind:
                case "Committed":
                    found.committed.pop(revision, None)
                    found.committed[revision] = place
                case "Exposed":
                    found.exposed.pop(revision, None)
                    found.exposed[revision] = place
                case "Held":
                    found.held = place
                case "Abandoned":
                    found.abandoned.add(revision)
                case "Pinned" | "Unpinned":
                    found.pinned.pop(revision, None)
                    found.pinned[revision] = place
                case "Retired":
                    found.retired.add(revision)
        return found

    def _with(self, entries: dict[int, Entry], revision: int, fact: Fact) -> dict[int, Entry]:
        known = entries.get(revision)
        if known is not None and self._order(known) > fact.order:
            return entries
        found = {r: e for r, e in entries.items() if r != revision}
        last = next(reversed(found.values()), None)
        found[revision] = fact
        if last is None or self._order(last) <= fact.order:
            return found
        return dict(sorted(found.items(), key=lambda item: self._order(item[1])))

    def _order(self, entry: Entry) -> tuple[object, ...]:
        return self.fact(entry).order


class Index:
    """Not locked: one thread applies changes; others may read meanwhile and see each fact whole."""

    def __init__(self, catalogue: Catalogue, *, history: bool = True) -> None:
        """Without `history` it reads and keeps what counts now: see `heads.select` for what it then does not know."""
        self._catalogue = catalogue
        self._history = history
        self._known = _Known(Columns.empty())
        self._served: tuple[int, Sequence[str]] = -1, ()
        self.version = -1
        """Catalogue version up to which facts are applied; -1 before the first."""

    @classmethod
    def load(cls, catalogue: Catalogue, *, history: bool = True) -> Index:
        index = cls(catalogue, history=history)
        index.apply(index.fetch())
        return index

    def refresh(self) -> list[Fact]:
        """Apply and return what was committed since. An async caller runs `fetch` and `fold` in threads."""
        changes = self.fetch()
        self.apply(changes)
        self.fold()
        return list(changes)

    def fetch(self) -> Changes:
        """What was committed since `version`; changes nothing."""
        return self._catalogue.facts(None if self.version < 0 else self.version, history=self._history)

    def apply(self, changes: Changes) -> None:
        if changes.whole is not None and changes.version >= self.version:
            self._known = _Known(changes.whole)
        for fact in changes.facts:
            self._known.apply(fact)
        self.version = max(self.version, changes.version)

    def fold(self) -> None:
        """Turn recent facts into columns when there are many; seconds for millions. Not while changes are applied."""
        known = self._known
        if len(known.recent) >= max(FOLD_AFTER, len(known.columns) // 4):
            self._known = known.folded(history=self._history)

    def __contains__(self, member: str) -> bool:
        return member in self._known.columns.members or member in self._known.changed

    def members(self) -> Set[str]:
        """Names of members with any fact."""
        known = self._known
        return known.columns.members.keys() | known.changed.keys() if known.changed else known.columns.members.keys()

    def get(self, member: str, revision: int) -> Fact | None:
        """The Committed fact of a revision, abandoned and retired ones too."""
        known = self._known
        found = known.member(member)
        entry = found.committed.get(revision) if found else None
        return None if entry is None else known.fact(entry)

    def newest(self, member: str) -> Fact | None:
        """The highest committed revision that is neither abandoned nor retired."""
        return next(self._standing(member), None)

    def exposed(self, member: str) -> Fact | None:
        """The Committed fact of the revision to serve: the held one while there is a hold, else the last exposed."""
        hold = self.hold(member)
        if hold is not None and hold.revision is not None:
            return self.get(member, hold.revision)
        last = self.exposures(member)[:1]
        return self.get(member, last[0]) if last else None

    def exposures(self, member: str) -> list[int]:
        """Revisions that were exposed, the last one first."""
        found = self._known.member(member)
        return list(reversed(found.exposed)) if found else []

    def exposed_members(self) -> Sequence[str]:
        """Members with something to serve, by name."""
        version, found = self._served
        if version != self.version:
            version, known = self.version, self._known
            doubtful = known.columns.with_kind("Held") | known.changed.keys()
            served = known.columns.with_kind("Exposed") - doubtful
            found = sorted(served | {m for m in doubtful if self.exposed(m) is not None})
            self._served = version, found
        return found

    def hold(self, member: str) -> Fact | None:
        """The Held fact in force: nothing else may be exposed until it is lifted."""
        known = self._known
        found = known.member(member)
        held = None if found is None or found.held is None else known.fact(found.held)
        return held if held is not None and held.revision is not None else None

    def next_revision(self, member: str) -> int:
        """Revision numbers start at 1 and are never used again, not even those of abandoned revisions."""
        found = self._known.member(member)
        return max(found.committed, default=0) + 1 if found else 1

    def lineage(self, member: str) -> list[Fact]:
        """The newest revision, its parent, and so on to the first."""
        chain: list[Fact] = []
        at = self.newest(member)
        while at is not None and (not chain or at.revision != chain[-1].revision):
            chain.append(at)
            at = self.get(member, at.parent) if at.parent is not None else None
        return chain

    def of_run(self, run: str) -> list[Fact]:
        """Facts that a run committed, in order."""
        known = self._known
        return [*known.columns.facts(run=run), *(f for f in known.recent if f.run == run)]

    def with_digest(self, digest: str) -> list[Fact]:
        """Committed facts of these bytes, of whatever member."""
        known = self._known
        return [*known.columns.with_digest(digest), *(f for f in known.recent if f.digest == digest)]

    def resume_point(self, members: Iterable[str], *, run: str | None = None) -> dict[str, Fact]:
        """Per member the newest standing revision with state (of `run`, when given); members with none are left out."""
        points: dict[str, Fact] = {}
        for member in members:
            for fact in self._standing(member):
                if fact.state is not None and run in (None, fact.run):
                    points[member] = fact
                    break
        return points

    def is_pinned(self, member: str, revision: int) -> bool:
        known = self._known
        found = known.member(member)
        last = None if found is None else found.pinned.get(revision)
        return last is not None and known.fact(last).kind == "Pinned"

    def is_abandoned(self, member: str, revision: int) -> bool:
        found = self._known.member(member)
        return found is not None and revision in found.abandoned

    def is_retired(self, member: str, revision: int) -> bool:
        found = self._known.member(member)
        return found is not None and revision in found.retired

    def _standing(self, member: str) -> Iterator[Fact]:
        """Committed facts from the highest revision down, without abandoned and retired ones."""
        known = self._known
        found = known.member(member)
        if found is None:
            return
        gone = found.abandoned | found.retired
        for revision in sorted(found.committed, reverse=True):
            if revision not in gone:
                yield known.fact(found.committed[revision])
