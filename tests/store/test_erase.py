"""Erasure takes all of one population and nothing of another, wherever it dies and whoever comes in between."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from allele.store import Fact, Objects, OwnershipError, PopulationRecord, PopulationStore, StoreUnavailable, erase
from allele.store.erase import Erased
from allele.store.objects import Version

pytestmark = pytest.mark.everywhere

MINE = PopulationRecord(uid="uid-1", base_digest="sha256:base", shapes={"g": "shape"})
OTHER = MINE.model_copy(update={"uid": "uid-2", "adopt": True})
Committed = Callable[..., Fact]


class Killed(BaseException):
    """Nobody catches it: what SIGKILL is to a process."""


def fill(store: PopulationStore, committed: Committed, record: PopulationRecord = MINE) -> PopulationStore:
    """A claimed population with two commits, states, and an object that nobody names."""
    store.claim(record)
    writer = store.catalogue.start("run")
    for revision in (1, 2):
        state = store.write_segments({"m": b"state"}, "states")["m"]
        place = store.write_segments({"m": b"weights"})["m"]
        fact = Fact.committed(member="m", revision=revision, weights=place, state=state, shape="s")
        writer.commit(revision, [fact])
    store.objects.put("provenance/x.json", b"{}")
    return store


def paths(store: PopulationStore) -> list[str]:
    return sorted(o.path for o in store.objects.list())


@pytest.fixture
def neighbours(store_url: str, committed: Committed) -> dict[str, list[str]]:
    """Folder → its objects: of a namesake in another namespace, of one whose name begins alike, of the bases."""
    root = Objects.open(store_url)
    root.put("bases/tiny/manifest.json", b"{}")
    for namespace, name in (("team", "users-2"), ("team", "user"), ("other", "users")):
        fill(PopulationStore.of(root, namespace=namespace, population=name), committed, OTHER)
    return beside(store_url)


def beside(url: str) -> dict[str, list[str]]:
    root = Objects.open(url)
    folders = ("team/users-2", "team/user", "other/users", "bases")
    return {f: sorted(o.path for o in root.list(f)) for f in folders}


def test_all_of_it_goes_and_nothing_beside_it(
    store: PopulationStore, store_url: str, committed: Committed, neighbours: dict[str, list[str]]
) -> None:
    there = paths(fill(store, committed))
    seen: list[tuple[str, int, int]] = []
    done = erase.erase(store, uid="uid-1", progress=lambda *told: seen.append(told))
    assert (done.outcome, done.objects) == ("Erased", len(there))
    assert paths(store) == []
    assert beside(store_url) == neighbours
    assert [what for what, _, _ in seen] == ["delete catalogue/_delta_log/", "delete catalogue/", "delete the rest"]
    assert seen[-1][1:] == (len(there) - 1, len(there) - 1)
    assert erase.erase(store, uid="uid-1") == Erased("NothingThere", "uid-1")
    store.claim(OTHER)
    assert store.record() == OTHER.model_copy(update={"adopt": False})


def test_what_another_population_adopted_stays(store: PopulationStore, committed: Committed) -> None:
    fill(store, committed).claim(OTHER)
    before = paths(store)
    assert erase.erase(store, uid="uid-1") == Erased("OwnedByAnother", "uid-2")
    assert paths(store) == before
    assert store.record() == OTHER.model_copy(update={"adopt": False})


def test_leftovers_without_a_record_go(store: PopulationStore) -> None:
    store.write_segments({"m": b"late"})
    assert erase.erase(store, uid="uid-1").objects == 2
    assert paths(store) == []


@pytest.mark.parametrize("record", [MINE, OTHER, MINE.model_copy(update={"adopt": True})], ids=lambda r: r.uid)
def test_nobody_can_claim_it_meanwhile(store: PopulationStore, committed: Committed, record: PopulationRecord) -> None:
    refused = []

    def claim(*_: object) -> None:
        with pytest.raises(OwnershipError, match=r"population\.json: .*uid-1 being erased: wait until it is gone"):
            store.claim(record)
        refused.append(True)

    erase.erase(fill(store, committed), uid="uid-1", progress=claim)
    assert refused


def dying(store: PopulationStore, monkeypatch: pytest.MonkeyPatch, *, at: int, after: bool) -> list[int]:
    """Lets the process die before or after its `at`-th write; the list counts them."""
    count = [0]

    def wrap(real: Callable[..., None]) -> Callable[..., None]:
        def write(*args: object, **kwargs: object) -> None:
            count[0] += 1
            if count[0] == at and not after:
                raise Killed
            real(*args, **kwargs)
            if count[0] == at:
                raise Killed

        return write

    monkeypatch.setattr(erase, "_THREADS", 1)
    monkeypatch.setattr(erase, "BATCH", 1)  # the pool would go on with what it was given
    for name in ("put", "create", "replace", "delete"):
        monkeypatch.setattr(store.objects, name, wrap(getattr(store.objects, name)))
    return count


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("leftovers", [False, True], ids=["owned", "unclaimed"])
def test_killed_at_any_write_it_is_finished_by_the_next_attempt(
    store_url: str, committed: Committed, neighbours: dict[str, list[str]], leftovers: bool, after: bool
) -> None:
    at, writes = 0, 1
    while at < writes:
        at += 1
        store = PopulationStore.open(store_url, namespace="team", population="users")
        if leftovers:
            store.write_segments({"m": b"late"})
        else:
            fill(store, committed)
        with pytest.MonkeyPatch.context() as patch:
            count = dying(store, patch, at=at, after=after)
            try:
                erase.erase(store, uid="uid-1")
            except Killed:
                writes = count[0] + 1
        fresh = PopulationStore.open(store_url, namespace="team", population="users")
        if paths(fresh) and (record := fresh.record()) and record.erasing:
            with pytest.raises(OwnershipError, match="being erased"):
                fresh.claim(OTHER)
        elif record := fresh.record():
            assert (at, after) == (1, False), "without the mark nothing may be gone"
            assert len([f for f in fresh.catalogue.facts() if f.kind == "Committed"]) == 2
        assert erase.erase(fresh, uid="uid-1").outcome in ("Erased", "NothingThere")
        assert paths(fresh) == []
        assert beside(store_url) == neighbours
    assert writes > (2 if leftovers else 9)


def test_a_process_killed_by_the_system_is_followed_up(
    store: PopulationStore, store_url: str, committed: Committed
) -> None:
    fill(store, committed)
    script = (
        "import os, signal, sys\n"
        "from allele.store import erase, jobs\n"
        "erase.BATCH = 2\n"
        "def die(what, done, total):\n"
        "    if done >= 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "jobs.Told = lambda: die\n"
        "jobs.main(sys.argv[1:])\n"
    )
    place = ["--store", store_url, "--namespace", "team", "--population", "users", "--uid", "uid-1"]
    done = subprocess.run([sys.executable, "-c", script, "erase", *place], env=os.environ, check=False)
    assert done.returncode == -9
    record = store.record()
    assert record is not None and record.erasing
    assert erase.erase(store, uid="uid-1").outcome == "Erased"
    assert paths(store) == []


def test_an_erasure_that_overslept_stops_before_a_successors_objects(
    store: PopulationStore, store_url: str, committed: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in the catalogue's log repeat: a list made before would hit the successor's."""
    fill(store, committed)
    monkeypatch.setattr(erase, "BATCH", 2)
    other = PopulationStore.open(store_url, namespace="team", population="users")
    after: list[str] = []

    def successor(*_: object) -> None:
        if not after:
            assert erase.erase(other, uid="uid-1").outcome == "Erased"
            after.extend(paths(fill(other, committed, OTHER)))

    with pytest.raises(OwnershipError, match="found uid-2: another erasure has finished"):
        erase.erase(store, uid="uid-1", progress=successor)
    assert paths(store) == after


def test_who_claims_between_the_look_and_the_mark_keeps_all(
    store: PopulationStore, committed: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, committed)
    real, late = store.recorded, [OTHER]

    def recorded() -> tuple[PopulationRecord, Version] | None:
        found = real()
        if late:
            store_claim(late.pop())
        return found

    def store_claim(record: PopulationRecord) -> None:
        PopulationStore(store.objects, namespace="team", population="users").claim(record)

    monkeypatch.setattr(store, "recorded", recorded)
    before = paths(store)
    assert erase.erase(store, uid="uid-1").outcome == "OwnedByAnother"
    assert paths(store) == before


def test_a_claim_does_not_undo_a_mark_that_came_in_between(
    store: PopulationStore, committed: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, committed)
    real, late = store.recorded, [True]

    def recorded() -> tuple[PopulationRecord, Version] | None:
        found = real()
        if late:
            late.clear()
            erase._mark(PopulationStore(store.objects, namespace="team", population="users"), "uid-1")
        return found

    monkeypatch.setattr(store, "recorded", recorded)
    with pytest.raises(OwnershipError, match="being erased"):
        store.claim(OTHER)
    record = store.record()
    assert record is not None and (record.uid, record.erasing) == ("uid-1", True)


def test_what_a_writer_adds_meanwhile_goes_too_and_one_that_never_stops_is_told(store: PopulationStore) -> None:
    left = [2]

    def late(*_: object) -> None:
        left[0] -= 1
        if left[0] >= 0:
            store.write_segments({"m": b"late"})

    store.claim(MINE)
    store.write_segments({"m": b"early"})
    assert erase.erase(store, uid="uid-1", progress=late).objects == 4
    assert paths(store) == []
    store.claim(MINE)
    store.write_segments({"m": b"early"})
    left[0] = 1_000
    with pytest.raises(StoreUnavailable, match="something still writes here"):
        erase.erase(store, uid="uid-1", progress=late)
    assert store.record() is not None, "the record is the last to go"
