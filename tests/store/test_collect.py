"""A collector beside drivers and readers: it deletes late, never what is needed, and can die anywhere."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from allele.store import Fact, FencedError, Index, ObjectNotFound, PopulationStore
from allele.store import collect as collection
from allele.store.collect import RUN, Collected, collect, survey, vacuumable
from allele.store.facts import now
from allele.store.retention import FOLDERS

from .collector import POLICY

GRACE = POLICY.grace
COLLECTOR = Path(__file__).parent / "collector.py"


class Passes:
    """A clock of which facts and collectors take the time: `later` lets a grace period pass. Objects keep the real one,
    so that all of them look old to a pass that is later."""

    def __init__(self, store: PopulationStore) -> None:
        self.store = store
        self.now = now()

    def later(self) -> None:
        self.now += GRACE + timedelta(minutes=1)

    def collect(self) -> Collected:
        return collect(self.store, policy=POLICY, now=self.now)


@pytest.fixture
def passes(store: PopulationStore, monkeypatch: pytest.MonkeyPatch) -> Passes:
    passes = Passes(store)
    monkeypatch.setattr("allele.store.facts.now", lambda: passes.now)
    return passes


def paths(store: PopulationStore) -> set[str]:
    return {o.path for folder in FOLDERS for o in store.objects.list(folder)}


def publish(store: PopulationStore, step: int, members: list[str], *, run: str = "run", state: bool = True) -> None:
    """One step of a driver: a segment and a segment of states with what is recognisable of each member."""
    writer = store.catalogue.start(run)
    index = Index.load(store.catalogue)
    weights = store.write_segments({m: f"{m} {step} ".encode() * 50 for m in members})
    states = store.write_segments({m: f"{m} {step} state ".encode() * 50 for m in members}, "states") if state else {}
    writer.commit(
        step,
        [
            Fact.committed(
                member=m,
                revision=index.next_revision(m),
                weights=weights[m],
                state=states.get(m),
                shape="s",
                metrics={"step": step},
                probe=(-1.5,),
            )
            for m in members
        ],
    )


def readable(store: PopulationStore) -> dict[tuple[str, int], tuple[bytes, bytes | None]]:
    """Bytes of all revisions that are not retired: weights, and state where there is one."""
    index = Index.load(store.catalogue)
    found = {}
    for m in index.members():
        for r in range(1, index.next_revision(m)):
            fact = index.get(m, r)
            if fact is not None and fact.weights is not None and not index.is_retired(m, r):
                found[m, r] = (store.read(fact.weights), store.read(fact.state) if fact.state else None)
    return found


@pytest.mark.everywhere
def test_a_population_is_collected_in_passes(store: PopulationStore, passes: Passes) -> None:
    for step in range(1, 7):
        publish(store, step, ["a", "b"])
    everything = paths(store)
    first = passes.collect()
    assert not first.plan.retire and not first.plan.delete, "all is young"
    assert len(first.plan.drop) == 8
    passes.later()
    second = passes.collect()
    assert {(r.fact.member, r.fact.revision) for r in second.plan.retire} == {(m, r) for m in "ab" for r in range(1, 5)}
    assert len(second.plan.delete) == 4, "the states that were dropped before"
    passes.later()
    third = passes.collect()
    assert len(third.plan.delete) == 4 and not third.plan.retire
    assert len(paths(store)) == 4 and paths(store) < everything
    assert {r for _, r in readable(store)} == {5, 6}
    assert not passes.collect().plan


def test_garbage_of_a_crash_is_deleted_only_when_it_is_old(store: PopulationStore, passes: Passes) -> None:
    publish(store, 1, ["a"])
    before = paths(store)
    store.write_segments({"a": b"never committed"})
    store.write_segments({"a": b"never committed"}, "states")
    assert not passes.collect().plan
    passes.later()
    assert {d.reason for d in passes.collect().plan.delete} == {"no fact names it"}
    assert paths(store) == before


def test_a_commit_between_plan_and_delete_is_respected(store: PopulationStore, passes: Passes) -> None:
    publish(store, 1, ["a"])
    late = store.write_segments({"b": b"written long before it was committed"})["b"]
    passes.later()
    assert [d.path for d in survey(store, policy=POLICY, now=passes.now).delete] == [late.path]

    def commit_now(what: str, done: int, total: int) -> None:
        if (what, done) == ("delete", 0):
            fact = Fact.committed(member="b", revision=1, weights=late, shape="s")
            store.catalogue.start("another").commit(1, [fact])

    done = collect(store, policy=POLICY, now=passes.now, progress=commit_now)
    assert not done.plan.delete
    assert readable(store)["b", 1][0] == b"written long before it was committed"


def test_a_pin_between_passes_saves_the_bytes(store: PopulationStore, passes: Passes) -> None:
    for step in range(1, 4):
        publish(store, step, ["a"], state=False)
    passes.later()
    place = Index.load(store.catalogue).get("a", 1)
    assert place is not None and place.weights is not None
    assert [r.fact.revision for r in passes.collect().plan.retire] == [1]
    store.catalogue.start("someone").commit(1, [Fact(kind="Pinned", member="a", revision=1)])
    passes.later()
    assert not passes.collect().plan.delete
    assert store.read(place.weights) == b"a 1 " * 50


@pytest.fixture
def sparse(store: PopulationStore, passes: Passes) -> Iterator[PopulationStore]:
    """Segments 1 and 2 have four members each, of which only d is still needed: its revisions 1 and 2."""
    for step in (1, 2):
        publish(store, step, ["a", "b", "c", "d"])
    for step in (3, 4):
        publish(store, step, ["a", "b", "c"])
    passes.later()
    assert len(passes.collect().plan.retire) == 6
    passes.later()
    yield store


def test_compaction_moves_what_is_live_and_nothing_else_changes(sparse: PopulationStore, passes: Passes) -> None:
    before, known = readable(sparse), Index.load(sparse.catalogue).get("d", 1)
    old = paths(sparse)
    done = passes.collect()
    assert len(done.plan.compact) == 4, "two segments and two of states"
    assert len(paths(sparse) - old) == 2, "what is live in them fits one new object of each kind"
    assert readable(sparse) == before
    moved = Index.load(sparse.catalogue).get("d", 1)
    assert known is not None and moved is not None
    assert (moved.segment, moved.state_segment) != (known.segment, known.state_segment)
    same = {"segment": "", "offset": 0, "state_segment": "", "state_offset": 0, "time": None}
    assert dataclasses.replace(moved, **same) == dataclasses.replace(known, **same), "run, step, metrics, digest stay"
    assert not passes.collect().plan


def test_a_state_that_goes_in_the_pass_that_moves_its_weights_does_not_come_back(
    store: PopulationStore, passes: Passes
) -> None:
    for step in range(1, 5):
        publish(store, step, ["a", "b", "c", "d"])
    writer = store.catalogue.start("someone")
    events = [Fact(kind="Exposed", member="d", revision=1), Fact(kind="Pinned", member="d", revision=1)]
    writer.commit(1, events)
    writer.commit(2, [Fact(kind="Exposed", member="d", revision=2)])
    passes.later()
    passes.collect()
    writer.commit(3, [Fact(kind="Unpinned", member="d", revision=1)])
    before = Index.load(store.catalogue).get("d", 1)
    assert before is not None and before.state is not None
    passes.later()
    done = passes.collect()
    assert [(d.fact.member, d.fact.revision) for d in done.plan.drop] == [("d", 1)]
    after = Index.load(store.catalogue).get("d", 1)
    assert after is not None and after.segment != before.segment and after.state is None
    assert readable(store)["d", 1] == (b"d 1 " * 50, None)


def test_a_reader_with_the_old_place_reads_until_a_later_pass(sparse: PopulationStore, passes: Passes) -> None:
    old = Index.load(sparse.catalogue).get("d", 2)
    assert old is not None and old.weights is not None and old.state is not None
    passes.collect()
    assert sparse.read(old.weights) == b"d 2 " * 50
    passes.later()
    assert len(passes.collect().plan.delete) == 4
    with pytest.raises(ObjectNotFound):
        sparse.read(old.weights)
    assert readable(sparse)["d", 2] == (b"d 2 " * 50, b"d 2 state " * 50)


def test_what_is_damaged_is_not_copied_and_the_rest_is(
    sparse: PopulationStore, passes: Passes, damage: Callable[[str, Callable[[bytes], bytes]], None]
) -> None:
    hurt = Index.load(sparse.catalogue).get("d", 1)
    assert hurt is not None and hurt.weights is not None
    damage(f"team/users/{hurt.weights.path}", lambda data: data[:-1] + b"!")
    done = passes.collect()
    assert len(done.damaged) == 1 and hurt.weights.path in done.damaged[0]
    index = Index.load(sparse.catalogue)
    assert [(index.get("d", r) or hurt).segment == hurt.segment for r in (1, 2)] == [True, False]
    passes.later()
    assert hurt.weights.path in paths(sparse), done.damaged
    passes.collect()
    assert hurt.weights.path in paths(sparse), "the evidence is not deleted"


def test_the_older_of_two_collectors_stops(sparse: PopulationStore, passes: Passes) -> None:
    before = readable(sparse)

    def another(what: str, done: int, total: int) -> None:
        if what == "compact" and done == 0:
            sparse.catalogue.start(RUN)

    with pytest.raises(FencedError, match="a newer driver"):
        collect(sparse, policy=POLICY, now=passes.now, progress=another)
    assert readable(sparse) == before
    passes.collect()
    assert readable(sparse) == before


def test_a_driver_resumes_from_what_is_left(sparse: PopulationStore, passes: Passes) -> None:
    passes.collect()
    passes.later()
    passes.collect()
    point = Index.load(sparse.catalogue).resume_point(["a", "d"], run="run")
    assert {m: (f.revision, f.run, f.step) for m, f in point.items()} == {"a": (4, "run", 4), "d": (2, "run", 2)}
    assert sparse.catalogue.start("run").last_step == 4
    assert all(f.state is not None and sparse.read(f.state) for f in point.values())


@pytest.mark.parametrize("death", ["facts", "copy", "places", "delete", "between-deletes"])
def test_a_collector_killed_between_two_writes_leaves_all_readable_and_the_next_converges(
    sparse: PopulationStore, store_url: str, passes: Passes, death: str
) -> None:
    if death == "facts":
        publish(sparse, 5, ["a", "b", "c"])
        passes.later()
    elif "delete" in death:
        passes.collect()
        passes.later()
    before = readable(sparse)
    command = [sys.executable, COLLECTOR, store_url, passes.now.isoformat(), "--die", death]
    assert subprocess.run(command, env=os.environ, check=False, timeout=120).returncode == -signal.SIGKILL
    after = readable(sparse)
    assert all(before[key] in (bytes_, (bytes_[0], before[key][1])) for key, bytes_ in after.items())
    for _ in range(4):
        passes.collect()
        passes.later()
    final = readable(sparse)
    assert final.keys() <= before.keys() and {("a", 4), ("d", 1), ("d", 2)} <= final.keys()
    assert all(data[0] == before[key][0] for key, data in final.items())
    assert not passes.collect().plan
    assert paths(sparse) == named(sparse)


def named(store: PopulationStore) -> set[str]:
    """Objects that the facts which count need."""
    index = Index.load(store.catalogue)
    found: set[str] = set()
    for m in index.members():
        for r in range(1, index.next_revision(m)):
            fact = index.get(m, r)
            if fact is not None and not index.is_retired(m, r):
                found |= {place.path for place in (fact.weights, fact.state) if place is not None}
    return found


def test_catalogue_files_that_a_compaction_replaced_go_after_a_week(store: PopulationStore, passes: Passes) -> None:
    for step in range(1, 5):
        publish(store, step, ["a"], state=False)
    store.catalogue.compact()
    log = {o.path for o in store.catalogue.objects.list("_delta_log")}
    assert vacuumable(store.catalogue, policy=POLICY, now=passes.now + timedelta(days=6)) == []
    assert len(vacuumable(store.catalogue, policy=POLICY, now=passes.now + timedelta(days=8))) == 4
    passes.now += timedelta(days=8)
    passes.collect()
    assert log <= {o.path for o in store.catalogue.objects.list("_delta_log")}
    assert {r for _, r in readable(store)} == {3, 4}


def test_large_compactions_are_bounded(
    sparse: PopulationStore, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "SEGMENT_BYTES", 250)
    monkeypatch.setattr(collection, "_CHUNK_BYTES", 100)
    before, old = readable(sparse), paths(sparse)
    passes.collect()
    assert len(paths(sparse) - old) == 4
    assert readable(sparse) == before


def test_nothing_is_written_where_there_is_nothing_to_do(store: PopulationStore, passes: Passes) -> None:
    publish(store, 1, ["a"])
    version = store.catalogue.version()
    passes.collect()
    assert store.catalogue.version() == version
