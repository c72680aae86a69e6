"""A reader of heads and of what came after them knows as much of the present as one that has read all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.store import Catalogue, Changes, Fact, Index, PopulationStore, heads
from allele.store.collect import collect
from allele.store.columns import Columns
from allele.store.facts import now, to_arrow
from tests.store.scenarios import AT_ONCE, BEFORE, MEMBERS, SCENARIOS, publish, work
from tests.store.test_columns import MEMBERS as FEW
from tests.store.test_columns import REVISIONS, histories, nothing

OPERATIONS = (*BEFORE, *SCENARIOS["collect"], publish, publish)


def present(index: Index, members: Sequence[str], *, of: Index) -> dict[str, Any]:
    """What an index says of the present: of what `of`, which knows everything, has and has not retired."""
    found: dict[str, Any] = {"served": list(index.exposed_members())}
    for m in (m for m in members if of.next_revision(m) > 1):
        revisions = range(1, of.next_revision(m))
        there = [r for r in revisions if of.get(m, r) and not of.is_retired(m, r)]
        parents = {f.parent for r in there if (f := of.get(m, r)) is not None and f.parent}
        found[m] = {
            "known": m in index and m in index.members(),
            "next": index.next_revision(m),
            "newest": index.newest(m),
            "exposed": index.exposed(m),
            "hold": index.hold(m),
            "exposures": [r for r in index.exposures(m) if r in there],
            "revisions": [index.get(m, r) for r in there],
            "parents": [index.get(m, r) for r in sorted(parents)],
            "resume": index.resume_point([m]),
            "flags": [(index.is_pinned(m, r), index.is_abandoned(m, r), index.is_retired(m, r)) for r in there],
            "wrong": [r for r in revisions if index.get(m, r) and index.is_retired(m, r) != of.is_retired(m, r)],
        }
    return found


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(0, 25), st.randoms(use_true_random=False))
def test_heads_and_later_facts_are_as_good_as_all(facts: list[Fact], cut: int, drawn: Any) -> None:
    """Also when they come in another order than that in which they count. No later fact is of what was retired and
    left out before: such revisions are neither served nor trained from."""
    drawn.shuffle(facts)
    known = Index(nothing())
    known.apply(Changes(1, whole=Columns(to_arrow(facts[:cut]))))
    selected = heads.select(Columns(to_arrow(facts[:cut])))
    by_heads = Index(nothing(), history=False)
    by_heads.apply(Changes(1, whole=Columns(selected)))
    assert present(by_heads, FEW, of=known) == present(known, FEW, of=known)
    assert heads.select(Columns(selected)).num_rows == selected.num_rows
    gone = {(m, r) for m in FEW for r in REVISIONS if known.get(m, r) and not by_heads.get(m, r)}
    assert all(known.is_retired(m, r) for m, r in gone)
    later = [f for f in facts[cut:] if not {(f.member, f.revision), (f.member, f.parent)} & gone]
    for index in (known, by_heads):
        index.apply(Changes(2, later))
    assert present(by_heads, FEW, of=known) == present(known, FEW, of=known)


def test_a_kind_that_only_a_later_version_knows_is_kept() -> None:
    fact = Fact(kind="Blessed", member="a", revision=1, run="x", step=1, time=now())  # type: ignore[arg-type]
    assert heads.select(Columns(to_arrow([fact]))).num_rows == 1


@pytest.fixture
def collected(store: PopulationStore) -> PopulationStore:
    """A population with a life and passes of the collector behind it, and two more steps."""
    work(store, OPERATIONS, first=1)
    return store


def same(store: PopulationStore, found: Index | None = None) -> None:
    """An index without history says the same of the present as one with it."""
    found, whole = found or Index.load(store.catalogue, history=False), Index.load(store.catalogue)
    assert found.version == whole.version == store.catalogue.version()
    assert present(found, MEMBERS, of=whole) == present(whole, MEMBERS, of=whole)


def test_a_reader_of_heads_needs_nothing_older(collected: PopulationStore) -> None:
    objects = collected.catalogue.objects
    whole = Index.load(collected.catalogue)
    older = [f"_delta_log/{v:020d}.json" for v in range(heads.version(objects) + 1)]
    objects.delete([*older, *(o.path for o in objects.list() if "checkpoint" in o.path)])
    found = Index.load(Catalogue(objects), history=False)
    assert present(found, MEMBERS, of=whole) == present(whole, MEMBERS, of=whole)


def test_heads_hold_less_than_the_catalogue_and_a_pass_makes_them_anew(collected: PopulationStore) -> None:
    objects = collected.catalogue.objects
    before = heads.version(objects)
    collect(collected, policy=AT_ONCE, now=now())
    found = heads.newest(objects)
    assert found is not None and found[0] == collected.catalogue.version() > before
    whole, index = Index.load(collected.catalogue), Index.load(collected.catalogue, history=False)
    retired = [(m, r) for m in MEMBERS for r in range(1, whole.next_revision(m)) if whole.is_retired(m, r)]
    assert any(index.get(m, r) is None for m, r in retired)
    assert [o.path for o in objects.list(heads.FOLDER)] == [f"{heads.FOLDER}/{found[0]:020d}.parquet"]
    same(collected)


@pytest.mark.parametrize("damage", [b"", b"PAR1 is not all", None])
def test_heads_that_are_damaged_or_gone_cost_the_long_way(collected: PopulationStore, damage: bytes | None) -> None:
    objects = collected.catalogue.objects
    (path,) = [o.path for o in objects.list(heads.FOLDER)]
    if damage is None:
        objects.delete([path])
    else:
        objects.put(path, damage)
    same(collected)


def test_a_reader_that_slept_until_files_were_collected_goes_on(collected: PopulationStore) -> None:
    asleep = Index.load(collected.catalogue, history=False)
    work(collected, (*OPERATIONS, publish), first=1)
    collected.catalogue.compact()
    collect(collected, policy=AT_ONCE, now=now())
    asleep.refresh()
    same(collected, asleep)


def test_a_reader_far_behind_reads_every_entry_of_the_log(collected: PopulationStore) -> None:
    behind = Index.load(collected.catalogue, history=False)
    writer = collected.catalogue.start("another")
    for step in range(40):
        writer.commit(step, [Fact(kind="Held", member="m0", revision=1, reason=str(step))] if step % 3 == 0 else [])
    behind.refresh()
    hold = behind.hold("m0")
    assert hold is not None and hold.reason == "39"
    assert behind.version == collected.catalogue.version()
