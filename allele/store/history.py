"""History: what all facts of one member say, including what no longer counts. For retention, and for people.

An index answers what a member is now; this keeps what it was: earlier places of bytes, earlier exposures, and since
when something is so.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from datetime import datetime

import pyarrow as pa

from allele.protocol.commands import ByteRange
from allele.store import facts as rows
from allele.store.facts import Fact

_ORDER = [(c, "ascending") for c in ("member", "time", "run", "step", "revision")]


@dataclasses.dataclass(slots=True)
class History:
    """Made by `of` or `histories`."""

    member: str
    committed: dict[int, Fact] = dataclasses.field(default_factory=dict)
    """The Committed fact that counts, by revision."""
    since: dict[int, datetime] = dataclasses.field(default_factory=dict)
    """When each revision was first committed."""
    replaced: list[tuple[ByteRange, datetime]] = dataclasses.field(default_factory=list)
    """Places that a later Committed fact no longer names, and since when."""
    exposures: list[int] = dataclasses.field(default_factory=list)
    """Revisions in the order of their exposure, without immediate repetitions."""
    held: int | None = None
    pinned: set[int] = dataclasses.field(default_factory=set)
    abandoned: set[int] = dataclasses.field(default_factory=set)
    retired: dict[int, datetime] = dataclasses.field(default_factory=dict)
    """When each retired revision was first retired."""

    @classmethod
    def of(cls, member: str, facts: Iterable[Fact]) -> History:
        """Of the member's facts in the order of `Fact.order`."""
        history = cls(member)
        for fact in facts:
            history._apply(fact)
        return history

    @property
    def served(self) -> int | None:
        """The held revision, else the last exposed one."""
        return self.held if self.held is not None else next(reversed(self.exposures), None)

    @property
    def served_before(self) -> int | None:
        """The last revision other than the served one that was exposed before it and may still have its bytes."""
        at = self.served
        ends = [i for i, r in enumerate(self.exposures) if r == at] or [len(self.exposures)]
        before = self.exposures[: ends[-1]]
        return next((r for r in reversed(before) if r != at and r not in self.retired), None)

    def standing(self) -> list[int]:
        """Revisions neither abandoned nor retired, the highest first."""
        return [r for r in sorted(self.committed, reverse=True) if r not in self.abandoned and r not in self.retired]

    def _apply(self, fact: Fact) -> None:
        assert fact.time is not None, "a fact has a time once it is committed"
        revision = fact.revision
        if fact.kind == "Held":
            self.held = revision
            return
        assert revision is not None, "facts are checked before they are committed"
        match fact.kind:
            case "Committed":
                known = self.committed.get(revision)
                if known is not None:
                    named = {fact.weights, fact.state}
                    gone = (p for p in (known.weights, known.state) if p is not None and p not in named)
                    self.replaced.extend((p, fact.time) for p in gone)
                self.committed[revision] = fact
                self.since.setdefault(revision, fact.time)
            case "Exposed":
                if self.exposures[-1:] != [revision]:
                    self.exposures.append(revision)
            case "Abandoned":
                self.abandoned.add(revision)
            case "Pinned":
                self.pinned.add(revision)
            case "Unpinned":
                self.pinned.discard(revision)
            case "Retired":
                self.retired.setdefault(revision, fact.time)


def histories(table: pa.Table) -> Iterator[History]:
    """Of every member of a table of facts, by name; one is in memory at a time besides the table, which is copied."""
    ordered = rows.from_arrow(table.sort_by(_ORDER))
    for member, facts in itertools.groupby(ordered, key=lambda f: f.member):
        yield History.of(member, facts)
