"""A checker over recorded histories of a population: what happened, when it began, when it was known to have ended.

An operation takes effect at one moment between its start and its end; of one whose outcome is unknown (its end is
never) it is not known whether it took effect at all. A history is wrong when no such moments explain it. The idea is
that of etcd's robustness tests; members are independent, so each is checked alone, by rules rather than by search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["commit", "expose", "read", "collect"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One operation on one revision of one member; times in seconds of the machine's monotonic clock."""

    kind: Kind
    member: str
    revision: int
    start: float
    end: float = math.inf
    """Infinite: the outcome is unknown."""
    digest: str = ""
    """Of the bytes committed, or of those that a read returned; empty for a read that found none."""
    as_exposed: bool = False
    """The read asked for what is exposed, and was given this revision."""


class Recorder:
    """Appends events to a file, one line each, so that those of a process that is killed remain."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    @contextlib.contextmanager
    def during(self, *events: Event) -> Iterator[None]:
        """Record events that start now and end with the block; when it raises, their outcome is unknown.

        They are written twice, as begun and as ended.
        """
        start = time.monotonic()
        for event in events:
            self.write(dataclasses.replace(event, start=start, end=math.inf))
        yield
        end = time.monotonic()
        for event in events:
            self.write(dataclasses.replace(event, start=start, end=end))

    def write(self, event: Event) -> None:
        self._file.write(json.dumps(dataclasses.asdict(event)) + "\n")


def load(folder: Path) -> list[Event]:
    """Events of all files of a folder; of one that was written as begun and as ended, the latter."""
    events: dict[tuple[str, Kind, str, int, float], Event] = {}
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            event = Event(**json.loads(line))
            events[path.name, event.kind, event.member, event.revision, event.start] = event
    return list(events.values())


def violations(events: Iterable[Event]) -> list[str]:
    """What is wrong with a history, one line each; empty for a good one."""
    members: dict[str, list[Event]] = {}
    for event in events:
        members.setdefault(event.member, []).append(event)
    return [line for history in members.values() for line in _of_member(history)]


def _of_member(history: list[Event]) -> Iterator[str]:
    by_kind: dict[Kind, list[Event]] = {"commit": [], "expose": [], "read": [], "collect": []}
    for event in sorted(history, key=lambda e: e.start):
        by_kind[event.kind].append(event)
    commits, exposures = by_kind["commit"], by_kind["expose"]
    yield from _commits(commits)
    for exposure in exposures:
        if not any(c.revision == exposure.revision and c.start <= exposure.end for c in commits):
            yield f"exposed, never committed: {exposure}"
    for read in by_kind["read"]:
        yield from _read(read, commits, exposures, by_kind["collect"])
    for collection in by_kind["collect"]:
        yield from _collection(collection, commits, exposures)


def _commits(commits: list[Event]) -> Iterator[str]:
    known = [c for c in commits if c.end < math.inf]
    for i, later in enumerate(known):
        for earlier in known[:i]:
            if earlier.revision == later.revision:
                yield f"a revision was committed twice: {earlier}, {later}"
            elif earlier.end < later.start and earlier.revision > later.revision:
                yield f"revisions went back: {earlier}, then {later}"


def _read(read: Event, commits: list[Event], exposures: list[Event], collections: list[Event]) -> Iterator[str]:
    possible = [c for c in commits if c.revision == read.revision and c.start <= read.end]
    if not possible:
        yield f"read, never committed: {read}"
    elif not read.digest:
        if not any(c.revision == read.revision and c.start <= read.end for c in collections):
            yield f"committed and not collected, but not found: {read}"
    elif read.digest not in {c.digest for c in possible}:
        yield f"read other bytes than were committed: {read}, {possible}"
    if read.as_exposed and not any(
        e.revision == read.revision and _may_stand(e, exposures, read.start, read.end) for e in exposures
    ):
        yield f"read as exposed, was not exposed at any moment of the read: {read}"


def _collection(collection: Event, commits: list[Event], exposures: list[Event]) -> Iterator[str]:
    newest = max((c.revision for c in commits if c.end < collection.start), default=0)
    if collection.revision == newest:
        yield f"collected the newest revision: {collection}"
    for exposure in exposures:
        if exposure.revision == collection.revision and _must_stand(exposure, exposures, collection):
            yield f"collected what is exposed: {collection}, {exposure}"


def _may_stand(exposure: Event, exposures: list[Event], start: float, end: float) -> bool:
    """Whether an exposure can have been the last at some moment from `start` to `end`."""
    replaced = (o for o in exposures if o is not exposure and o.start > exposure.end and o.end < start)
    return exposure.start <= end and not any(replaced)


def _must_stand(exposure: Event, exposures: list[Event], collection: Event) -> bool:
    """Whether an exposure was the last all through a collection, whatever the unknown moments."""
    if exposure.end >= collection.start:
        return False
    return not any(o.revision != exposure.revision and exposure.start <= o.end and o.start <= collection.end
                   for o in exposures)  # fmt: skip
