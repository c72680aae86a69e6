"""Conditions and the events that go with them.

A condition's time moves only when its status does, and a message that says the same is not a change: at rest the new
status equals the old one and nothing is written. An event is sent when a condition's reason becomes another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from allele_operator.planning import observe
from allele_operator.planning.model import Event, Obj

Severity = Literal["Normal", "Warning"]
LIMIT = 1024
"""Characters of a message."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a plan found about one condition."""

    type: str
    status: bool | None
    """None: unknown."""
    reason: str
    message: str
    severity: Severity = "Normal"
    """Of the event that tells it."""
    flickers: bool = False
    """It follows what every step of a run finds, and may come and go with each."""


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why something is not well: becomes the reason and message of conditions."""

    reason: str
    message: str
    severity: Severity = "Warning"

    def of(self, type_: str, *, status: bool | None = False) -> Found:
        return Found(type_, status, self.reason, self.message, self.severity)


def merged(obj: Obj, found: Sequence[Found], now: datetime) -> list[Obj]:
    """The object's next list of conditions."""
    out = []
    for f in found:
        status = {True: "True", False: "False", None: "Unknown"}[f.status]
        old = observe.condition(obj, f.type)
        same = old.get("status") == status
        out.append(
            {
                "type": f.type,
                "status": status,
                "reason": f.reason,
                "message": f.message[:LIMIT],
                "observedGeneration": obj["metadata"].get("generation", 0),
                "lastTransitionTime": old["lastTransitionTime"] if same else stamp(now),
            }
        )
    return out


def events(obj: Obj, found: Sequence[Found]) -> tuple[Event, ...]:
    """One event for each reason that is new; several conditions with the same reason tell it once."""
    new: dict[str, Event] = {}
    for f in found:
        if observe.condition(obj, f.type).get("reason") != f.reason:
            new.setdefault(f.reason, Event(f.severity, f.reason, f.message[:LIMIT], flickers=f.flickers))
    return tuple(new.values())


def stamp(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse(time: str) -> datetime:
    return datetime.fromisoformat(time)


def since(time: str, now: datetime) -> timedelta:
    return now - parse(time)
