"""Index: what every member is now, in memory, kept up to date by tailing the catalogue.

All answers follow from facts in the order of `Fact.order`, not from the order of arrival, so two replicas that have
seen the same facts answer the same. Facts that it has already applied change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, KeysView

from allele.store.catalogue import Catalogue, Changes
from allele.store.facts import Fact


@dataclasses.dataclass(slots=True)
class _Member:
    """The facts of a member that still count; sets are made when first needed, as most members need none."""

    committed: dict[int, Fact] = dataclasses.field(default_factory=dict)
    exposed: Fact | None = None
    held: Fact | None = None
    abandoned: set[int] | None = None
    pinned: dict[int, Fact] | None = None
    retired: set[int] | None = None


class Index:
    """Not locked: one thread applies changes; others may read meanwhile and see each fact whole."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._members: dict[str, _Member] = {}
        self.version = -1
        """Catalogue version up to which facts are applied; -1 before the first."""

    @classmethod
    def load(cls, catalogue: Catalogue) -> Index:
        index = cls(catalogue)
        index.apply(index.fetch())
        return index

    def refresh(self) -> list[Fact]:
        """Apply and return what was committed since. An async caller runs `fetch` in a thread, then `apply`."""
        changes = self.fetch()
        self.apply(changes)
        return list(changes)

    def fetch(self) -> Changes:
        """What was committed since `version`; changes nothing."""
        return self._catalogue.facts(None if self.version < 0 else self.version)

    def apply(self, changes: Changes) -> None:
        for fact in changes:
            self._apply(fact)
        self.version = max(self.version, changes.version)

    def __contains__(self, member: str) -> bool:
        return member in self._members

    def members(self) -> KeysView[str]:
        """Names of members with any fact."""
        return self._members.keys()

    def get(self, member: str, revision: int) -> Fact | None:
        """The Committed fact of a revision, abandoned and retired ones too."""
        known = self._members.get(member)
        return known.committed.get(revision) if known else None

    def newest(self, member: str) -> Fact | None:
        """The highest committed revision that is neither abandoned nor retired."""
        return next(self._standing(member), None)

    def exposed(self, member: str) -> Fact | None:
        """The Committed fact of the revision to serve: the held one while there is a hold, else the last exposed."""
        known = self._members.get(member)
        if known is None:
            return None
        chosen = self.hold(member) or known.exposed
        return known.committed.get(chosen.revision) if chosen is not None and chosen.revision is not None else None

    def hold(self, member: str) -> Fact | None:
        """The Held fact in force: nothing else may be exposed until it is lifted."""
        known = self._members.get(member)
        held = known.held if known else None
        return held if held is not None and held.revision is not None else None

    def next_revision(self, member: str) -> int:
        """Revision numbers start at 1 and are never used again, not even those of abandoned revisions."""
        known = self._members.get(member)
        return max(known.committed, default=0) + 1 if known else 1

    def lineage(self, member: str) -> list[Fact]:
        """The newest revision, its parent, and so on to the first."""
        chain: list[Fact] = []
        at = self.newest(member)
        while at is not None and (not chain or at.revision != chain[-1].revision):
            chain.append(at)
            at = self.get(member, at.parent) if at.parent is not None else None
        return chain

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
        known = self._members.get(member)
        last = (known.pinned or {}).get(revision) if known is not None else None
        return last is not None and last.kind == "Pinned"

    def is_abandoned(self, member: str, revision: int) -> bool:
        known = self._members.get(member)
        return known is not None and revision in (known.abandoned or ())

    def is_retired(self, member: str, revision: int) -> bool:
        known = self._members.get(member)
        return known is not None and revision in (known.retired or ())

    def _standing(self, member: str) -> Iterator[Fact]:
        """Committed facts from the highest revision down, without abandoned and retired ones."""
        known = self._members.get(member)
        if known is None:
            return
        gone = (known.abandoned or set()) | (known.retired or set())
        for revision in sorted(known.committed, reverse=True):
            if revision not in gone:
                yield known.committed[revision]

    def _apply(self, fact: Fact) -> None:
        known = self._members.get(fact.member)
        if known is None:
            known = self._members[fact.member] = _Member()
        if fact.kind == "Held":
            known.held = _later(known.held, fact)
            return
        assert fact.revision is not None, "facts are checked before they are committed"
        match fact.kind:
            case "Committed":
                known.committed[fact.revision] = _later(known.committed.get(fact.revision), fact)
            case "Exposed":
                known.exposed = _later(known.exposed, fact)
            case "Abandoned":
                known.abandoned = (known.abandoned or set()) | {fact.revision}
            case "Pinned" | "Unpinned":
                pinned = known.pinned or {}
                known.pinned = pinned | {fact.revision: _later(pinned.get(fact.revision), fact)}
            case "Retired":
                known.retired = (known.retired or set()) | {fact.revision}


def _later(known: Fact | None, fact: Fact) -> Fact:
    return fact if known is None or known.order <= fact.order else known
