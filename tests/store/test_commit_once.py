"""A step is committed exactly once, whatever happens around the commit; what is not committed does not exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from allele.protocol.errors import InvalidRequest
from allele.store import Fact, Index, InvalidFact, PopulationStore, StoreUnavailable, delta
from allele.store import writer as writer_module

pytestmark = pytest.mark.everywhere


def facts(store: PopulationStore) -> list[tuple[str, int | None]]:
    return [(f.member, f.revision) for f in store.catalogue.facts()]


def test_an_empty_store_has_no_version_and_no_facts(store: PopulationStore) -> None:
    assert store.catalogue.version() == -1
    assert facts(store) == []
    assert Index.load(store.catalogue).version == -1
    assert list(store.objects.list()) == []


def test_committing_a_step_again_changes_nothing(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    writer = store.catalogue.start("run")
    version = writer.commit(1, [committed("a", 1)])
    assert writer.commit(1, [committed("a", 1)]) == version
    assert writer.commit(0, [committed("a", 9)]) == version
    assert facts(store) == [("a", 1)]
    assert store.catalogue.version() == version


def test_a_restarted_driver_sees_where_its_run_stopped(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    first = store.catalogue.start("run")
    assert (first.fence, first.last_step) == (1, None)
    first.commit(7, [committed("a", 1)])
    second = store.catalogue.start("run")
    assert (second.fence, second.last_step) == (2, 7)
    assert store.catalogue.start("another").last_step is None


def test_the_writer_fills_in_run_fence_step_and_a_time_that_grows(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.catalogue.start("run")
    writer = store.catalogue.start("run")
    writer.commit(1, [committed("a", 1)])
    real = writer_module.rows.now()
    monkeypatch.setattr(writer_module.rows, "now", lambda: real.replace(year=real.year - 1))  # a slow clock
    writer.commit(2, [committed("a", 2), committed("b", 1, step=40)])
    a1, *later = store.catalogue.facts()
    assert (a1.run, a1.fence, a1.step) == ("run", 2, 1)
    assert {(f.member, f.step) for f in later} == {("a", 2), ("b", 40)}
    assert all(f.time is not None and a1.time is not None and f.time > a1.time for f in later)


def test_a_lost_answer_does_not_commit_twice(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = store.catalogue.start("run")
    real, calls = delta.commit, []

    def lossy(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        real(*args, **kwargs)
        if len(calls) == 1:
            raise OSError("connection reset by peer")

    monkeypatch.setattr(delta, "commit", lossy)
    version = writer.commit(1, [committed("a", 1)])
    assert (len(calls), facts(store), store.catalogue.version()) == (1, [("a", 1)], version)


def test_a_store_that_stays_away_is_said_to_be_unavailable(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = store.catalogue.start("run")

    def down(*args: Any, **kwargs: Any) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(delta, "commit", down)
    monkeypatch.setattr(writer_module, "_MAX_WAIT", 0.0)
    with pytest.raises(StoreUnavailable, match="run run step 1 is not known to be committed"):
        writer.commit(1, [committed("a", 1)])
    monkeypatch.undo()
    assert facts(store) == []


def test_a_commit_with_one_bad_fact_writes_nothing(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    writer = store.catalogue.start("run")
    before = store.catalogue.version()
    good = committed("a", 1)
    bad: list[tuple[Fact, type[Exception], str]] = [
        (Fact(kind="Exposed", member="no/slash", revision=1), InvalidRequest, r"facts\[1\].member"),
        (Fact(kind="Exposed", member="b"), InvalidFact, r"facts\[1\] \(Exposed of b\): revision"),
        (Fact(kind="Committed", member="b", revision=1), InvalidFact, "expected byte range"),
        (Fact(kind="Lost", member="b", revision=1), InvalidFact, "kind"),  # type: ignore[arg-type]
        (good, InvalidFact, "twice"),
    ]
    for fact, error, message in bad:
        with pytest.raises(error, match=message):
            writer.commit(1, [good, fact])
    assert store.catalogue.version() == before
