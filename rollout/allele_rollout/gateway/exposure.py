"""Which revision a bare name means on this replica: pure."""

from __future__ import annotations

from collections.abc import Sequence

from allele.store.facts import Fact


def candidates(exposed: Fact | None, hold: Fact | None, history: Sequence[int]) -> list[int]:
    """Revisions to try, best first; `history`: those that were exposed, the last one first.

    A hold stands alone: it was set to keep others from being served.
    """
    if exposed is None or exposed.revision is None:
        return []
    if hold is not None:
        return [exposed.revision]
    return [exposed.revision, *[r for r in history if r != exposed.revision][:1]]
