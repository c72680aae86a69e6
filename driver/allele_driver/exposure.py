"""Whether a revision may be served: pure.

Every replica loads it and compares what it serves with what was trained; one that disagrees is enough to keep the
revision before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from allele.protocol.serving import ProbeResult


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of all replicas together."""

    member: str
    revision: int
    verdict: str
    """Passed, or the first other verdict."""
    max_gap: float | None
    """Largest |served − trained| of any replica."""
    message: str

    @property
    def passed(self) -> bool:
        return self.verdict == "Passed"

    @property
    def metrics(self) -> dict[str, float]:
        """Of the Exposed fact."""
        return {} if self.max_gap is None else {"max_gap": self.max_gap}


def combined(results: Mapping[str, Sequence[ProbeResult]]) -> list[Verdict]:
    """One verdict per target, from replica → results; a target that some replica left out has not passed."""
    targets = dict.fromkeys((r.member, r.revision) for found in results.values() for r in found)
    return [_verdict(member, revision, results) for member, revision in targets]


def _verdict(member: str, revision: int, results: Mapping[str, Sequence[ProbeResult]]) -> Verdict:
    found = {
        replica: next((r for r in rs if (r.member, r.revision) == (member, revision)), None)
        for replica, rs in results.items()
    }
    gaps = [r.max_gap for r in found.values() if r is not None and r.max_gap is not None]
    for replica, r in found.items():
        if r is None or r.verdict != "Passed":
            verdict = "LoadFailed" if r is None else r.verdict
            message = f"{replica}: {'no verdict' if r is None else r.message}"
            return Verdict(member, revision, verdict, max(gaps, default=None), message)
    return Verdict(member, revision, "Passed", max(gaps, default=None), "")
