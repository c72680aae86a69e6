"""A reader that polls sees every fact once, reads only what is new, and notices no compaction."""

from __future__ import annotations

from collections.abc import Callable

import duckdb
import pytest
from deltalake import DeltaTable

from allele.store import Fact, Index, PopulationStore
from allele.store import catalogue as catalogue_module


@pytest.mark.everywhere
def test_each_fact_is_seen_once_across_compaction(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    writer = store.catalogue.start("run")
    index = Index.load(store.catalogue)
    seen: list[tuple[str, int | None]] = []
    for step in range(1, 7):
        writer.commit(step, [committed("a", step), committed("b", step)])
        if step in (2, 4):
            store.catalogue.compact()
        if step != 3:
            seen += [(f.member, f.revision) for f in index.refresh()]
    assert sorted(seen) == sorted((m, r) for m in "ab" for r in range(1, 7))
    assert index.refresh() == []
    assert index.version == store.catalogue.version()


def test_a_poll_reads_only_what_is_new(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = store.catalogue.start("run")
    for step in range(1, 5):
        writer.commit(step, [committed("a", step)])
    index = Index.load(store.catalogue)
    writer.commit(5, [committed("a", 5)])
    store.catalogue.compact()
    paths: list[str] = []
    get = store.catalogue.objects.get
    monkeypatch.setattr(store.catalogue.objects, "get", lambda path: paths.append(path) or get(path))
    assert [f.revision for f in index.refresh()] == [5]
    assert len([p for p in paths if p.endswith(".parquet")]) == 1
    paths.clear()
    assert index.refresh() == []
    assert paths == [f"_delta_log/{index.version + 1:020d}.json"], "an idle poll is one request"


def test_an_index_loaded_after_compaction_equals_one_that_tailed(
    store: PopulationStore, committed: Callable[..., Fact]
) -> None:
    tailed = Index.load(store.catalogue)
    writer = store.catalogue.start("run")
    tailed.refresh()
    for step in range(1, 6):
        writer.commit(step, [committed("a", step), Fact(kind="Exposed", member="a", revision=max(1, 4 - step))])
        tailed.refresh()
    store.catalogue.compact()
    loaded = Index.load(store.catalogue)
    assert loaded.exposed("a") == tailed.exposed("a")
    assert (loaded.exposed("a") or committed("a", 9)).revision == 1
    assert loaded.newest("a") == tailed.newest("a")


def test_commits_compact_by_themselves_and_stay_fenced(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allele.store.writer.COMPACT_EVERY", 4)
    writer = store.catalogue.start("run")
    for step in range(1, 11):
        writer.commit(step, [committed("a", step)])
    table = DeltaTable(store.catalogue.objects.url(), storage_options=store.catalogue.objects.delta_options)
    assert len(table.file_uris()) < 5
    assert [f.revision for f in store.catalogue.facts()] == list(range(1, 11))
    assert store.catalogue.start("run").last_step == 10, "transactions outlive compaction"


@pytest.mark.everywhere
def test_a_compacted_catalogue_is_an_ordinary_delta_table(
    store_url: str, store: PopulationStore, committed: Callable[..., Fact]
) -> None:
    writer = store.catalogue.start("run")
    for step in range(1, 4):
        writer.commit(step, [committed("a", step, metrics={"reward": step / 2})])
    store.catalogue.compact()
    table = DeltaTable(store.catalogue.objects.url(), storage_options=store.catalogue.objects.delta_options)
    arrow = table.to_pyarrow_table()  # noqa: F841 - DuckDB finds it by name
    rows = duckdb.sql("select revision, metrics['reward'] from arrow order by 1").fetchall()
    assert rows == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert store.catalogue.table().num_rows == 3


def test_losing_a_race_of_compactions_is_no_error(store: PopulationStore, committed: Callable[..., Fact]) -> None:
    writer = store.catalogue.start("run")
    for step in range(1, 4):
        writer.commit(step, [committed("a", step)])
    slow = catalogue_module.Catalogue.open(store.objects)
    slow.version()
    stale = slow.snapshot()
    store.catalogue.compact()
    slow.snapshot = lambda **_: stale  # type: ignore[method-assign,assignment]
    slow.compact()
    assert [f.revision for f in store.catalogue.facts()] == [1, 2, 3]
