"""When a member has failed so often that it stops, so that the run need not: pure but for its own counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

BAD_STEPS = 2
"""Steps in a row in which more than half of a member's samples were dropped, after which it stops."""


@dataclasses.dataclass
class Failures:
    """Of one run of the driver; a restarted driver gives every member another chance."""

    stopped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Member → why."""
    _bad: dict[str, int] = dataclasses.field(default_factory=dict)

    def note(self, member: str, *, dropped: Mapping[str, int], samples: int, example: str = "") -> None:
        """Samples of one step: how many were wanted, and how many of them were dropped for which reason."""
        lost = sum(dropped.values())
        if 2 * lost <= samples:
            self._bad.pop(member, None)
            return
        self._bad[member] = self._bad.get(member, 0) + 1
        if self._bad[member] >= BAD_STEPS:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
            self.stopped[member] = (
                f"more than half of its samples dropped in {BAD_STEPS} steps; in the last {reasons}{example}"
            )
