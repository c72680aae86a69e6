"""Bytes that are not those recorded are never handed out; what is whole is still readable."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from allele.protocol.commands import OptimizerSpec, ProbeSequence
from allele.protocol.errors import DigestMismatch
from allele.store import (
    BaseRef,
    DataRange,
    Fact,
    Index,
    ObjectNotFound,
    PopulationStore,
    Provenance,
    ShapeRef,
    Versions,
)

Damage = Callable[[str, Callable[[bytes], bytes]], None]


@pytest.fixture
def index(store: PopulationStore, committed: Callable[..., Fact]) -> Index:
    writer = store.catalogue.start("run")
    writer.commit(1, [committed("a", 1, data=b"x" * 1000)])
    writer.commit(2, [committed("a", 2, data=b"y" * 1000, parent=1)])
    return Index.load(store.catalogue)


def flip(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


@pytest.mark.parametrize(
    ("how", "found"), [("flip", "found [0-9a-f]{64}"), ("cut", "found 700 bytes.*truncated"), ("gone", "found 0 bytes")]
)
def test_a_damaged_revision_is_refused_and_the_older_one_is_served(
    store: PopulationStore, index: Index, damage: Damage, how: str, found: str
) -> None:
    newest = index.newest("a")
    assert newest is not None and newest.weights is not None and newest.parent is not None
    where = newest.weights
    edits: dict[str, Callable[[bytes], bytes]] = {"flip": flip, "cut": lambda d: d[:700], "gone": lambda d: b""}
    damage(f"team/users/{where.path}", edits[how])
    message = rf"{where.path} at 0.*expected .*{where.digest}.*{found}"
    with pytest.raises(DigestMismatch, match=message):
        store.read(where)
    with pytest.raises(DigestMismatch, match=message):
        store.read_many([where])
    with pytest.raises(DigestMismatch, match=message):
        asyncio.run(store.aread(where))
    with pytest.raises(DigestMismatch, match=message):
        asyncio.run(store.aread_many([where]))
    older = index.get("a", newest.parent)
    assert older is not None and older.weights is not None
    assert store.read(older.weights) == b"x" * 1000


def test_one_damaged_member_of_a_segment_does_not_spoil_the_others(store: PopulationStore, damage: Damage) -> None:
    ranges = store.write_segments({"a": b"a" * 400, "b": b"b" * 400})
    damage(f"team/users/{ranges['a'].path}", flip)
    assert store.read(ranges["a"]) == b"a" * 400
    with pytest.raises(DigestMismatch, match="at 400"):
        store.read(ranges["b"])


def test_a_segment_cut_before_several_members_is_refused(store: PopulationStore, damage: Damage) -> None:
    ranges = store.write_segments({m: m.encode() * 400 for m in "abcd"})
    damage(f"team/users/{ranges['a'].path}", lambda data: data[:600])
    message = r"at 400: expected 400 bytes.*found 200 bytes: the object is truncated"
    for last in "bcd":
        wanted = [ranges[m] for m in "abcd"[: "abcd".index(last) + 1]]
        with pytest.raises(DigestMismatch, match=message):
            store.read_many(wanted)
        with pytest.raises(DigestMismatch, match=message):
            asyncio.run(store.aread_many(wanted))
    assert store.read_many([ranges["a"]]) == [b"a" * 400]


def test_far_ranges_are_fetched_apart(store: PopulationStore) -> None:
    written = {m: os.urandom(700_000) for m in "abcdef"}
    ranges = store.write_segments(written)
    order = "facfa"
    assert store.read_many([ranges[m] for m in order]) == [written[m] for m in order]
    assert asyncio.run(store.aread_many([ranges[m] for m in order])) == [written[m] for m in order]


def test_a_missing_segment_is_named(store: PopulationStore) -> None:
    ranges = store.write_segments({"a": b"data"})
    store.objects.delete([ranges["a"].path])
    with pytest.raises(ObjectNotFound, match=ranges["a"].path):
        store.read(ranges["a"])


def provenance() -> Provenance:
    return Provenance(
        namespace="team",
        population="users",
        population_uid="u",
        run="r",
        run_uid="ru",
        fence=1,
        step=3,
        base=BaseRef(uri="bases/tiny", digest="sha256:b"),
        tokenizer_digest="t",
        shapes={"g": ShapeRef(digest="d", rank=8, alpha=16, scaling="Standard", targets=("q_proj",), init="Standard")},
        environment="e",
        reward="r",
        data=DataRange(cursor=10, prompts=8),
        policy_lag={0: 30, 1: 2},
        versions=Versions(allele="0"),
        optimizer=OptimizerSpec(),
        loss={"kind": "GRPO"},
        probes=(ProbeSequence(prompt=(1, 2), completion=(3,)),),
        time=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_provenance_is_addressed_by_its_content(store: PopulationStore, damage: Damage) -> None:
    sha = store.write_provenance(provenance())
    assert store.write_provenance(provenance()) == sha
    assert store.read_provenance(sha) == provenance()
    damage(f"team/users/provenance/{sha}.json", lambda d: d.replace(b'"step":3', b'"step":4'))
    with pytest.raises(DigestMismatch, match=f"provenance/{sha}.json"):
        store.read_provenance(sha)
    with pytest.raises(ObjectNotFound):
        store.read_provenance("0" * 64)


def test_provenance_of_a_later_version_is_read(store: PopulationStore) -> None:
    known = provenance()
    later = known.model_dump(mode="json")
    later |= {"energy": 1.5, "probes": [{**p, "weight": 2} for p in later["probes"]]}
    data = json.dumps(later).encode()
    sha = hashlib.sha256(data).hexdigest()
    store.objects.put(f"provenance/{sha}.json", data)
    assert store.read_provenance(sha) == known
