"""Which revision a bare name means on this replica: pure."""

from __future__ import annotations

from collections.abc import Iterable

from allele.store.facts import Fact


class Exposures:
    """The last two revisions exposed of each member, in catalogue order: what to serve, and what was served before."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, ...]] = {}

    def apply(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            if fact.kind == "Exposed" and fact.revision is not None:
                older = tuple(r for r in self._last.get(fact.member, ()) if r != fact.revision)
                self._last[fact.member] = (fact.revision, *older[:1])

    def of(self, member: str) -> tuple[int, ...]:
        """Newest first."""
        return self._last.get(member, ())


def candidates(exposed: Fact | None, hold: Fact | None, history: Iterable[int]) -> list[int]:
    """Revisions to try, best first. A hold stands alone: it was set to keep others from being served."""
    if exposed is None or exposed.revision is None:
        return []
    if hold is not None:
        return [exposed.revision]
    return [exposed.revision, *(r for r in history if r != exposed.revision)]
