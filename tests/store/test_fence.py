"""Of two drivers of a run only the one that started last commits, whenever the other wakes up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from allele.store import Catalogue, Fact, FencedError, PopulationStore, Writer

pytestmark = pytest.mark.everywhere


def visible(store: PopulationStore) -> list[tuple[str, int | None, int]]:
    return [(f.member, f.revision, f.fence) for f in store.catalogue.facts()]


def freeze_before_append(writer: Writer, monkeypatch: pytest.MonkeyPatch, while_frozen: Callable[[], None]) -> None:
    """Run `while_frozen` once, after the writer has looked at its fence and before it appends."""
    objects = writer._catalogue.objects
    put = objects.put
    once = threading.Lock()

    def pause(path: str, data: bytes) -> None:
        put(path, data)
        if once.acquire(blocking=False):
            while_frozen()

    monkeypatch.setattr(objects, "put", pause)


def test_the_older_writer_is_refused(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    old = store.catalogue.start("run")
    old.commit(1, [committed("a", 1)])
    new = store.catalogue.start("run")
    assert new.fence > old.fence
    with pytest.raises(FencedError, match="expected fence 1 to be the newest, found 2"):
        old.commit(2, [committed("a", 2)])
    new.commit(2, [committed("a", 2)])
    assert visible(store) == [("a", 1, 1), ("a", 2, 2)]


def test_a_writer_that_wakes_after_its_successor_committed_is_refused(
    store: PopulationStore, committed: Callable[..., Fact]
) -> None:
    old = store.catalogue.start("run")
    new = store.catalogue.start("run")
    new.commit(1, [committed("a", 1, metrics={"by": 2.0})])
    for step in (1, 2):  # the step that the successor has, and the next one
        with pytest.raises(FencedError):
            old.commit(step, [committed("a", step, metrics={"by": 1.0})])
    assert [dict(f.metrics) for f in store.catalogue.facts()] == [{"by": 2.0}]


def test_a_writer_frozen_between_its_look_and_its_append_is_refused(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.catalogue.start("run")
    successors: list[Writer] = []
    freeze_before_append(old, monkeypatch, lambda: successors.append(store.catalogue.start("run")))
    with pytest.raises(FencedError):
        old.commit(1, [committed("a", 1)])
    assert visible(store) == []
    successors[0].commit(1, [committed("a", 1)])
    assert visible(store) == [("a", 1, 2)]


def test_a_writer_frozen_while_its_successor_commits_the_same_step_is_refused(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.catalogue.start("run")

    def succeed() -> None:
        store.catalogue.start("run").commit(1, [committed("a", 1)])

    freeze_before_append(old, monkeypatch, succeed)
    with pytest.raises(FencedError):
        old.commit(1, [committed("a", 1)])
    assert visible(store) == [("a", 1, 2)]


def test_readers_of_the_same_catalogue_do_not_move_a_writers_snapshot(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.catalogue.start("run")

    def succeed_and_read() -> None:
        Catalogue.open(store.objects).start("run")
        store.catalogue.version()

    freeze_before_append(old, monkeypatch, succeed_and_read)
    with pytest.raises(FencedError):
        old.commit(1, [committed("a", 1)])
    assert visible(store) == []


def test_another_run_does_not_fence(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    one = store.catalogue.start("one")
    other = store.catalogue.start("other")
    one.commit(1, [committed("a", 1)])
    other.commit(1, [committed("b", 1)])
    assert sorted(visible(store)) == [("a", 1, 1), ("b", 1, 1)]


def test_writers_starting_at_once_get_different_fences(store: PopulationStore) -> None:
    store.catalogue.start("earlier")  # so that the table is there
    fences: list[int] = []
    threads = [
        threading.Thread(target=lambda: fences.append(Catalogue.open(store.objects).start("run").fence))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(fences)) == 4
