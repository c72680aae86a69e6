"""The checker of histories finds each thing that may not happen, and lets pass what only looks like it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.store.history import Event, Kind, Recorder, load, violations


def event(kind: Kind, revision: int, start: float, end: float, **fields: object) -> Event:
    digest = {"commit": f"d{revision}", "read": f"d{revision}"}.get(kind, "")
    values: dict[str, object] = {"digest": digest, **fields}
    return Event(kind=kind, member="m", revision=revision, start=start, end=end, **values)  # type: ignore[arg-type]


COMMITS = [event("commit", 1, 0, 1), event("commit", 2, 2, 3)]
EXPOSED = [*COMMITS, event("expose", 1, 4, 5), event("expose", 2, 6, 7)]


@pytest.mark.parametrize(
    ("found", "history"),
    [
        ("committed twice", [*COMMITS, event("commit", 2, 4, 5)]),
        ("committed twice", [*COMMITS, event("commit", 2, 2.5, 2.7, digest="other")]),
        ("went back", [event("commit", 2, 0, 1), event("commit", 1, 2, 3)]),
        ("read, never committed", [*COMMITS, event("read", 3, 4, 5)]),
        ("read, never committed", [*COMMITS, event("read", 2, 0, 1.5)]),
        ("read other bytes", [*COMMITS, event("read", 2, 4, 5, digest="d1")]),
        ("not found", [*COMMITS, event("read", 1, 4, 5, digest="")]),
        ("not found", [*COMMITS, event("collect", 1, 6, 7), event("read", 1, 4, 5, digest="")]),
        ("exposed, never committed", [*COMMITS, event("expose", 3, 4, 5)]),
        ("not exposed at any moment", [*EXPOSED, event("read", 1, 8, 9, as_exposed=True)]),
        ("not exposed at any moment", [*EXPOSED, event("read", 2, 5, 5.5, as_exposed=True)]),
        ("not exposed at any moment", [*COMMITS, event("read", 2, 5, 6, as_exposed=True)]),
        ("collected what is exposed", [*COMMITS, event("expose", 1, 4, 5), event("collect", 1, 6, 7)]),
        ("collected the newest", [*COMMITS, event("collect", 2, 6, 7)]),
    ],
)
def test_a_bad_history_is_found(found: str, history: list[Event]) -> None:
    (line,) = violations(history)
    assert found in line


@pytest.mark.parametrize(
    "history",
    [
        EXPOSED,
        [*COMMITS, event("commit", 3, 4, math.inf), event("commit", 3, 5, 6)],  # the first was lost, the other one done
        [*COMMITS, event("commit", 3, 4, math.inf), event("read", 3, 9, 10)],  # it was done after all
        [event("commit", 2, 0, 3), event("commit", 1, 1, 2)],  # at once
        [*COMMITS, event("read", 2, 1.5, 2.5)],  # the commit took effect before its end
        [*EXPOSED, event("read", 1, 6.5, 9, as_exposed=True)],  # read while it was replaced
        [*EXPOSED, event("expose", 1, 8, math.inf), event("read", 1, 20, 21, as_exposed=True)],
        [*EXPOSED, event("expose", 1, 8, math.inf), event("read", 2, 20, 21, as_exposed=True)],
        [*EXPOSED, event("collect", 1, 8, 9), event("read", 1, 8.5, 9.5, digest="")],
        [*EXPOSED, event("collect", 1, 6.5, 9)],  # replaced while it was collected
    ],
)
def test_a_good_history_passes(history: list[Event]) -> None:
    assert violations(history) == []


def test_members_do_not_mix() -> None:
    other = Event(kind="read", member="other", revision=1, start=4, end=5, digest="d1")
    assert len(violations([*COMMITS, other])) == 1


def test_what_is_recorded_is_loaded_with_unknown_outcomes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a")
    with recorder.during(event("commit", 1, 0, 0)):
        pass
    with pytest.raises(OSError), recorder.during(event("commit", 2, 0, 0)):
        raise OSError
    one, two = load(tmp_path)
    assert one.start < one.end < math.inf
    assert (two.revision, two.end) == (2, math.inf)
