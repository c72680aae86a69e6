"""When a member has failed so often that it stops, so that the run need not: pure but for its own counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from allele.protocol.serving import Gate
from allele_driver.exposure import Verdict

BAD_STEPS = 2
"""Steps in a row in which more than half of a member's samples were dropped, after which it stops."""
FAILED_PROBES = 3
"""Revisions in a row that were not what was trained, after which their member stops: the first may be a step that
hardly moved it, and each is sampled from although it is not served."""


@dataclasses.dataclass
class Failures:
    """Of one run of the driver; a restarted driver gives every member another chance."""

    stopped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Member → why."""
    _bad: dict[str, int] = dataclasses.field(default_factory=dict)
    _refused: dict[str, int] = dataclasses.field(default_factory=dict)

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

    def probed(self, verdict: Verdict, *, gate: Gate) -> None:
        """The verdict on a revision. One about a replica counts neither for nor against its member."""
        if verdict.passed:
            self._refused.pop(verdict.member, None)
        elif not verdict.outage:
            failed = self._refused[verdict.member] = self._refused.get(verdict.member, 0) + 1
            if failed >= FAILED_PROBES:
                self.stopped[verdict.member] = (
                    f"the probes of {failed} revisions in a row failed, the last of {verdict.said(gate)}"
                )
