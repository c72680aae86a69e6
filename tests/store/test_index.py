"""What a member is now follows from its facts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from allele.store import Changes, Fact, Index, PopulationStore, Writer


@pytest.fixture
def writer(store: PopulationStore) -> Writer:
    return store.catalogue.start("run")


def revision(fact: Fact | None) -> int | None:
    return fact.revision if fact else None


@pytest.mark.everywhere
def test_newest_exposed_and_next_revision(
    store: PopulationStore, writer: Writer, committed: Callable[..., Fact]
) -> None:
    index = Index.load(store.catalogue)
    assert (index.newest("a"), index.exposed("a"), index.next_revision("a")) == (None, None, 1)
    writer.commit(1, [committed("a", 1), committed("b", 1)])
    writer.commit(2, [committed("a", 2, parent=1), Fact(kind="Exposed", member="a", revision=1)])
    index.refresh()
    assert (revision(index.newest("a")), revision(index.exposed("a")), index.next_revision("a")) == (2, 1, 3)
    assert index.exposed("b") is None
    assert set(index.members()) == {"a", "b"}
    assert revision(index.get("a", 1)) == 1
    assert index.get("a", 7) is None and index.get("z", 1) is None
    assert store.read(index.newest("a").weights) == b"a@2"  # type: ignore[union-attr,arg-type]


def test_rollback_is_exposing_the_old_revision_and_a_hold_stays_in_force(
    store: PopulationStore, writer: Writer, committed: Callable[..., Fact]
) -> None:
    writer.commit(1, [committed("a", 1), committed("a", 2), Fact(kind="Exposed", member="a", revision=2)])
    operator = store.catalogue.start("rollback")
    operator.commit(1, [Fact(kind="Held", member="a", revision=1, reason="worse answers")])
    writer.commit(2, [committed("a", 3), Fact(kind="Exposed", member="a", revision=3)])
    index = Index.load(store.catalogue)
    assert revision(index.exposed("a")) == 1
    assert (index.hold("a") or writer_failed()).reason == "worse answers"
    operator.commit(2, [Fact(kind="Held", member="a", reason="lifted")])
    index.refresh()
    assert index.hold("a") is None
    assert revision(index.exposed("a")) == 3


def writer_failed() -> Fact:
    raise AssertionError("expected a hold, found none")


def test_resume_goes_back_to_state_and_an_abandoned_branch_is_out_of_the_lineage(
    store: PopulationStore, writer: Writer, committed: Callable[..., Fact]
) -> None:
    state = store.write_segments({"a": b"state of a@1"}, kind="states")["a"]
    writer.commit(1, [committed("a", 1, state=state), committed("b", 1)])
    writer.commit(2, [committed("a", 2, parent=1)])
    index = Index.load(store.catalogue)
    point = index.resume_point(["a", "b", "c"])
    assert {m: f.revision for m, f in point.items()} == {"a": 1}
    assert store.read(point["a"].state) == b"state of a@1"  # type: ignore[arg-type]
    assert index.resume_point(["a"], run="another") == {}

    writer.commit(3, [Fact(kind="Abandoned", member="a", revision=2)])
    index.refresh()
    assert index.is_abandoned("a", 2)
    assert revision(index.newest("a")) == 1
    assert index.next_revision("a") == 3, "numbers are never used again"
    writer.commit(4, [committed("a", 3, parent=1)])
    index.refresh()
    assert [f.revision for f in index.lineage("a")] == [3, 1]


def test_state_may_be_committed_after_the_weights(
    store: PopulationStore, writer: Writer, committed: Callable[..., Fact]
) -> None:
    writer.commit(1, [committed("a", 1)])
    index = Index.load(store.catalogue)
    assert index.resume_point(["a"]) == {}
    state = store.write_segments({"a": b"late"}, kind="states")["a"]
    writer.commit(2, [committed("a", 1, state=state)])
    index.refresh()
    assert store.read(index.resume_point(["a"])["a"].state) == b"late"  # type: ignore[arg-type]


def test_pinned_and_retired(store: PopulationStore, writer: Writer, committed: Callable[..., Fact]) -> None:
    writer.commit(1, [committed("a", 1), committed("a", 2)])
    writer.commit(2, [Fact(kind="Pinned", member="a", revision=1), Fact(kind="Retired", member="a", revision=2)])
    index = Index.load(store.catalogue)
    assert index.is_pinned("a", 1) and not index.is_pinned("a", 2)
    assert index.is_retired("a", 2)
    assert revision(index.newest("a")) == 1


def test_facts_keep_their_values(store: PopulationStore, writer: Writer, committed: Callable[..., Fact]) -> None:
    fact = committed(
        "a", 1, group="g", parent=None, probe=(-0.25, -1.5), metrics={"reward": 0.75}, provenance="f" * 64, reason="why"
    )
    writer.commit(1, [fact])
    found = Index.load(store.catalogue).get("a", 1)
    assert found is not None
    assert (found.group, found.probe, dict(found.metrics)) == ("g", (-0.25, -1.5), {"reward": 0.75})
    assert (found.provenance, found.reason, found.shape, found.parent) == ("f" * 64, "why", "shape", None)
    assert (found.weights, found.state) == (fact.weights, None)


def test_answers_do_not_depend_on_the_order_in_which_facts_arrive(
    store: PopulationStore, writer: Writer, committed: Callable[..., Fact]
) -> None:
    writer.commit(1, [committed("a", 1), committed("a", 2), Fact(kind="Exposed", member="a", revision=1)])
    writer.commit(2, [Fact(kind="Exposed", member="a", revision=2), Fact(kind="Held", member="a", revision=1)])
    writer.commit(3, [Fact(kind="Held", member="a")])
    changes = store.catalogue.facts()
    forward, backward = Index(store.catalogue), Index(store.catalogue)
    forward.apply(changes)
    backward.apply(Changes(changes.version, tuple(reversed(list(changes)))))
    for index in (forward, backward):
        assert index.hold("a") is None
        assert revision(index.exposed("a")) == 2
