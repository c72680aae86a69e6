"""Whether a revision may be served, and what the probes say in words: pure.

Every replica loads it and compares what it serves with what was trained; one that disagrees is enough to keep the
revision before. A replica that is silent, or cut off from its store, says nothing about the revision: it is not exposed
either, but the member is not to blame.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from allele.protocol.bundle import RunBundle
from allele.protocol.progress import Probes
from allele.protocol.serving import Gate, ProbeResult, Refusal

NAMED = 3
"""Members that are told with their numbers; of the others only how many."""
MESSAGE = 1024
"""Characters."""
_ONE = 280
"""Characters of one member's part."""
_GRAVEST: tuple[Refusal, ...] = ("LoadFailed", "Gap", "NotMoved")


def gate_of(bundle: RunBundle) -> Gate:
    exposure = bundle.population_spec.exposure
    return Gate(max_gap=exposure.max_gap, min_move=exposure.min_move)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of all replicas together."""

    member: str
    revision: int
    refusal: Refusal | None
    """None: it passed on every replica."""
    max_gap: float | None
    """Largest |served − trained| of any replica."""
    mean_gap: float | None = None
    """As the replica found it that refuses."""
    move: float | None = None
    message: str = ""
    outage: bool = False
    """The refusal is about a replica, not about the revision."""

    @property
    def passed(self) -> bool:
        return self.refusal is None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the Exposed fact."""
        return {} if self.max_gap is None else {"max_gap": self.max_gap}

    def said(self, gate: Gate) -> str:
        """`member@revision: verdict (numbers against the gate): message`."""
        numbers = [
            f"{name} {value:.3g}{limit}"
            for name, value, limit in (
                ("max gap", self.max_gap, f" of at most {gate.max_gap:g}"),
                ("mean gap", self.mean_gap, ""),
                ("move", self.move, f" of at least {gate.min_move:g}"),
            )
            if value is not None
        ]
        found = f" ({', '.join(numbers)})" if numbers else ""
        return f"{self.member}@{self.revision}: {self.refusal or 'Passed'}{found}: {self.message}"[:_ONE]


def combined(results: Mapping[str, Sequence[ProbeResult]]) -> list[Verdict]:
    """One verdict per target, from replica → results; a target that some replica left out has not passed."""
    targets = dict.fromkeys((r.member, r.revision) for found in results.values() for r in found)
    return [_verdict(member, revision, results) for member, revision in targets]


def _verdict(member: str, revision: int, results: Mapping[str, Sequence[ProbeResult]]) -> Verdict:
    found = {
        replica: next((r for r in rs if (r.member, r.revision) == (member, revision)), None)
        for replica, rs in results.items()
    }
    gap = max((r.max_gap for r in found.values() if r is not None and r.max_gap is not None), default=None)
    refusals = {replica: r for replica, r in found.items() if r is None or r.verdict != "Passed"}
    if not refusals:
        return Verdict(member, revision, None, gap)
    # What a replica found out about the revision says more than that another one is away.
    replica, r = min(refusals.items(), key=lambda item: item[1] is None or item[1].outage)
    if r is None or r.verdict == "Passed":
        return Verdict(member, revision, "LoadFailed", gap, message=f"{replica}: no verdict", outage=True)
    return Verdict(
        member,
        revision,
        r.verdict,
        gap,
        mean_gap=r.mean_gap,
        move=r.move,
        message=f"{replica}: {r.message}",
        outage=r.outage,
    )


def probes(failing: Sequence[Verdict], *, gate: Gate) -> Probes:
    """The state that is reported; `failing` are the members whose newest probe did not pass."""
    counts = Counter(v.refusal for v in failing if v.refusal is not None)
    if not counts:
        return Probes(reason="ProbesPassed", message="the newest probe of every member passed")
    reason = next(kind for kind in _GRAVEST if counts[kind])
    by_kind = ", ".join(f"{counts[kind]} {kind}" for kind in _GRAVEST if counts[kind])
    who = "1 member is" if len(failing) == 1 else f"{len(failing)} members are"
    some = [v for kind in _GRAVEST for v in failing if v.refusal == kind][:NAMED]
    rest = f"; and {len(failing) - NAMED} more" if len(failing) > NAMED else ""
    told = "; ".join(v.said(gate) for v in some) + rest
    said = f"{who} served by an older revision, their newest probe failed ({by_kind}): {told}"
    return Probes(reason=reason, failing=len(failing), message=said[:MESSAGE])
