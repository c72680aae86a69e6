"""Facts in columns answer as facts one by one, in any order, and outlive versions of the code."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.store import Catalogue, Changes, Fact, Index, Objects, PopulationStore, delta
from allele.store import facts as rows
from allele.store import index as index_module
from allele.store.columns import Columns
from allele.store.facts import KINDS, SCHEMA, to_arrow

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MEMBERS = ("a", "b", "c-1")
REVISIONS = range(1, 6)


@st.composite
def histories(draw: st.DrawFn) -> list[Fact]:
    """Facts of a few members, each with a time or run of its own; any kind may come at any time."""
    found = []
    for number in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(KINDS))
        revision = draw(st.sampled_from(REVISIONS))
        lifted = kind == "Held" and draw(st.booleans())
        found.append(
            Fact(
                kind=kind,  # type: ignore[arg-type]
                member=draw(st.sampled_from(MEMBERS)),
                revision=None if lifted else revision,
                step=number,
                parent=draw(st.sampled_from([None, 1, 2])),
                digest=f"digest-{revision % 3}" if kind == "Committed" else None,
                state_segment="s" if draw(st.booleans()) else None,
                state_offset=0,
                state_length=1,
                state_digest="d",
                run=draw(st.sampled_from(["x", "y"])),
                probe=draw(st.sampled_from([None, (0.5, -1.0)])),
                metrics=draw(st.sampled_from([{}, {"reward": 0.5}])),
                time=EPOCH + timedelta(seconds=draw(st.integers(0, 8))),
            )
        )
    made = {(f.member, f.revision) for f in found if f.kind == "Committed"}
    served = ("Exposed", "Held")
    return [f for f in found if f.kind not in served or f.revision is None or (f.member, f.revision) in made]


def nothing() -> Catalogue:
    return Catalogue.open(Objects.open("file:///tmp"))


def answers(index: Index) -> dict[str, Any]:
    """Everything that an index can be asked."""
    found: dict[str, Any] = {m: {} for m in MEMBERS}
    for m, of in found.items():
        of |= {"known": m in index, "next": index.next_revision(m), "exposures": index.exposures(m)}
        of |= {"newest": index.newest(m), "exposed": index.exposed(m), "hold": index.hold(m)}
        of |= {"revisions": [index.get(m, r) for r in REVISIONS], "resume": index.resume_point([m])}
        of |= {"resume x": index.resume_point([m], run="x")}
        of["flags"] = [(index.is_pinned(m, r), index.is_abandoned(m, r), index.is_retired(m, r)) for r in REVISIONS]
    found["members"] = set(index.members())
    found["served"] = list(index.exposed_members())
    found["of x"] = sorted(index.of_run("x"), key=lambda f: f.order)
    return found


def expected(facts: Sequence[Fact]) -> dict[str, Any]:
    """The same, as the words of `Fact` have it: a fact at a time, the later one counts."""
    found: dict[str, Any] = {}
    for m in MEMBERS:
        mine = sorted((f for f in facts if f.member == m), key=lambda f: f.order)
        of_kind = {kind: [f for f in mine if f.kind == kind] for kind in KINDS}
        committed = {f.revision: f for f in of_kind["Committed"]}
        gone = {f.revision for kind in ("Abandoned", "Retired") for f in of_kind[kind]}
        standing = [committed[r] for r in sorted(committed, reverse=True) if r not in gone]
        last = [f.revision for f in reversed(of_kind["Exposed"])]
        hold = of_kind["Held"][-1] if of_kind["Held"] and of_kind["Held"][-1].revision is not None else None
        served = hold.revision if hold else last[0] if last else None
        resume = [f for f in standing if f.state is not None]
        mine_of_x = [f for f in resume if f.run == "x"]
        found[m] = {
            "known": bool(mine),
            "next": max(committed, default=0) + 1,
            "exposures": list(dict.fromkeys(last)),
            "newest": standing[0] if standing else None,
            "exposed": committed.get(served),
            "hold": hold,
            "revisions": [committed.get(r) for r in REVISIONS],
            "resume": {m: resume[0]} if resume else {},
            "resume x": {m: mine_of_x[0]} if mine_of_x else {},
            "flags": [
                (
                    [f.kind for f in mine if f.revision == r and f.kind in ("Pinned", "Unpinned")][-1:] == ["Pinned"],
                    *(r in {f.revision for f in of_kind[k]} for k in ("Abandoned", "Retired")),
                )
                for r in REVISIONS
            ],
        }
    found["members"] = {f.member for f in facts}
    found["served"] = sorted(m for m in MEMBERS if found[m]["exposed"] is not None)
    found["of x"] = sorted((f for f in facts if f.run == "x"), key=lambda f: f.order)
    return found


@settings(max_examples=150, deadline=None)
@given(facts=histories(), loaded=st.integers(0, 25), seed=st.integers(0, 2**16), fold=st.sampled_from([1, 3, 1000]))
def test_columns_and_news_in_any_order_answer_as_the_facts(
    facts: list[Fact], loaded: int, seed: int, fold: int
) -> None:
    """Of facts that count at one and the same moment, none is later: such histories are not asked about."""
    orders = [(f.member, f.order) for f in facts]
    if len(set(orders)) < len(orders):
        facts = list(dict(zip(orders, facts, strict=True)).values())
    shuffled = random.Random(seed).sample(facts, len(facts))
    before = index_module.FOLD_AFTER
    index_module.FOLD_AFTER = fold
    try:
        index = Index(nothing())
        index.apply(Changes(1, whole=Columns(to_arrow(shuffled[:loaded]))))
        for number, fact in enumerate(shuffled[loaded:], start=2):
            index.apply(Changes(number, (fact,)))
        assert answers(index) == expected(facts)
        for fact in random.Random(seed).sample(shuffled, min(3, len(shuffled))):  # what it knows changes nothing
            index.apply(Changes(index.version, (fact,)))
        again = answers(index)
        again.pop("of x")
        assert again == {k: v for k, v in expected(facts).items() if k != "of x"}
    finally:
        index_module.FOLD_AFTER = before


def test_members_are_found_by_the_bytes_that_they_have() -> None:
    facts = [
        Fact(kind="Committed", member=m, revision=r, digest=d, run="x", step=r, time=EPOCH)
        for m, r, d in (("a", 1, "one"), ("b", 1, "two"), ("b", 2, "one"))
    ]
    index = Index(nothing())
    index.apply(Changes(1, whole=Columns(to_arrow(facts[:2]))))
    index.apply(Changes(2, facts[2:]))
    assert [(f.member, f.revision) for f in index.with_digest("one")] == [("a", 1), ("b", 2)]
    assert index.with_digest("three") == []


def test_a_reader_that_slept_until_its_files_were_collected_reads_all_again(
    store: PopulationStore, committed: Callable[..., Fact]
) -> None:
    writer = store.catalogue.start("run")
    writer.commit(1, [committed("a", 1)])
    slept, awake = Index.load(store.catalogue), Index.load(store.catalogue)
    writer.commit(2, [committed("a", 2)])
    writer.commit(3, [committed("b", 1), Fact(kind="Exposed", member="a", revision=2)])
    awake.refresh()
    store.catalogue.compact()
    table = store.catalogue.snapshot()
    assert table is not None
    live = {f.path for f in delta.live_files(table)}
    dead = [o.path for o in store.catalogue.objects.list() if o.path.endswith(".parquet")]
    store.catalogue.objects.delete([p.removeprefix("catalogue/") for p in dead if p.split("/")[-1] not in live])
    slept.refresh()
    awake.refresh()
    assert slept.version == awake.version == store.catalogue.version()
    assert (slept.exposed("a"), slept.newest("b")) == (awake.exposed("a"), awake.newest("b"))
    assert slept.refresh() == []


def test_a_table_of_an_older_version_is_read_and_gets_the_columns_that_came_since(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = pa.schema([f for f in SCHEMA if f.name not in ("shape", "probe")])
    monkeypatch.setattr(rows, "SCHEMA", older)
    store.catalogue.start("run").commit(1, [committed("a", 1, metrics={"reward": 0.5})])
    monkeypatch.undo()
    reader = Catalogue.open(store.objects)
    assert [(f.revision, f.shape, dict(f.metrics)) for f in reader.facts()] == [(1, None, {"reward": 0.5})]
    writer = reader.start("run")
    writer.commit(2, [committed("a", 2, probe=(0.5,))])
    assert [(f.revision, f.shape, f.probe) for f in reader.facts()] == [(1, None, None), (2, "shape", (0.5,))]
    reader.compact()
    assert [(f.revision, f.shape, f.probe) for f in reader.facts()] == [(1, None, None), (2, "shape", (0.5,))]
    table = DeltaTable(store.catalogue.objects.url(), storage_options=store.catalogue.objects.delta_options)
    arrow = table.to_pyarrow_table()  # noqa: F841 - DuckDB finds it by name
    assert duckdb.sql("select revision, shape from arrow order by 1").fetchall() == [(1, None), (2, "shape")]


def test_columns_and_kinds_of_a_later_version_are_left_out(
    store: PopulationStore, committed: Callable[..., Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = store.catalogue.start("run")
    writer.commit(1, [committed("a", 1)])
    tailed = Index.load(store.catalogue)
    later = SCHEMA.append(pa.field("mood", pa.string()))
    made = to_arrow([Fact(kind="Committed", member="a", revision=9, step=2, run="run", time=EPOCH)])
    strange = made.set_column(0, "kind", pa.array(["Praised"])).append_column("mood", pa.array(["good"]))
    table = store.catalogue.snapshot()
    assert table is not None
    delta.add_columns(table, later)
    table.update_incremental()
    delta.commit(table, [("run/other", 1)], delta.stage(store.catalogue.objects, strange))
    writer.commit(2, [committed("a", 2)])
    tailed.refresh()
    for index in (tailed, Index.load(store.catalogue)):
        newest = index.newest("a")
        assert newest is not None and newest.revision == 2
        assert index.next_revision("a") == 3
