"""Members of a segment are read alone or together, by range, as they were written."""

from __future__ import annotations

import asyncio
import hashlib
import os

import pytest

from allele.protocol.errors import InvalidRequest
from allele.store import AlreadyExists, ObjectNotFound, Objects, PopulationStore, population

pytestmark = pytest.mark.everywhere


def test_members_are_ranges_of_one_object(store: PopulationStore) -> None:
    written = {f"m{i}": os.urandom(1000 + i) for i in range(20)}
    ranges = store.write_segments(written)
    assert len({r.path for r in ranges.values()}) == 1
    assert next(iter(ranges.values())).path.startswith("segments/")
    assert {m: store.read(r) for m, r in ranges.items()} == written
    assert {m: r.digest for m, r in ranges.items()} == {m: hashlib.sha256(b).hexdigest() for m, b in written.items()}


def test_read_many_keeps_the_order_asked_for_across_segments(store: PopulationStore) -> None:
    first = store.write_segments({"a": b"alpha", "b": b"beta"})
    second = store.write_segments({"c": memoryview(b"gamma")}, kind="states")
    wanted = [second["c"], first["b"], first["a"], second["c"]]
    assert store.read_many(wanted) == [b"gamma", b"beta", b"alpha", b"gamma"]
    assert second["c"].path.startswith("states/")


def test_async_reads_give_the_same(store: PopulationStore) -> None:
    ranges = store.write_segments({f"m{i}": os.urandom(500) for i in range(8)})

    async def read() -> tuple[bytes, list[bytes]]:
        return await store.aread(ranges["m3"]), await store.aread_many(list(ranges.values()))

    one, many = asyncio.run(read())
    assert one == store.read(ranges["m3"])
    assert many == store.read_many(list(ranges.values()))


def test_segments_larger_than_a_part_are_whole(store: PopulationStore) -> None:
    written = {f"m{i}": os.urandom(5_000_000) for i in range(5)}
    ranges = store.write_segments(written)
    assert store.objects.head(ranges["m0"].path).size == 25_000_000
    assert store.read_many([ranges[m] for m in written]) == list(written.values())


def test_many_adapters_are_spread_over_bounded_objects(store: PopulationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "SEGMENT_BYTES", 250)
    sizes = {"a": 100, "b": 150, "c": 1, "d": 400, "e": 249, "f": 1}
    written = {m: os.urandom(n) for m, n in sizes.items()}
    ranges = store.write_segments(written)
    members: dict[str, str] = {}
    for m, r in ranges.items():
        members[r.path] = members.get(r.path, "") + m
    assert list(members.values()) == ["ab", "c", "d", "ef"], "one larger than the bound has an object of its own"
    assert {o.path: o.size for o in store.objects.list()} == {p: sum(sizes[m] for m in ms) for p, ms in members.items()}
    assert store.read_many([ranges[m] for m in written]) == list(written.values())


def test_an_empty_segment_is_not_written(store: PopulationStore) -> None:
    assert store.write_segments({}) == {}
    assert list(store.objects.list()) == []


def test_objects_are_created_once_listed_and_deleted(store_url: str) -> None:
    folder = Objects.open(store_url).at("a folder/ü")
    folder.create("x/1", b"one")
    with pytest.raises(AlreadyExists, match="x/1"):
        folder.create("x/1", b"two")
    folder.put("x/2", [b"tw", b"o"])
    assert folder.get("x/1") == b"one"
    assert sorted((i.path, i.size) for i in folder.list("x")) == [("x/1", 3), ("x/2", 3)]
    folder.delete(["x/1", "x/never"])
    with pytest.raises(ObjectNotFound, match="x/1"):
        folder.get("x/1")


@pytest.mark.parametrize(
    "url", ["http://bucket/x", "s3://", "gs:///x", "az://", "file://", "file:///", "/tmp/x", "file://host/dir"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="expected s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"):
        Objects.open(url)


@pytest.mark.parametrize("name", ["", "a/b", "a@1", "a:b", "a\n", "-a", "x" * 64, "ünder", "a b"])
def test_bad_member_names_are_refused_before_anything_is_written(store: PopulationStore, name: str) -> None:
    with pytest.raises(InvalidRequest, match="member: expected"):
        store.write_segments({name: b"data"})
    assert list(store.objects.list()) == []


@pytest.mark.parametrize(
    ("namespace", "population"), [("Team", "users"), ("team", "a/b"), ("", "users"), ("bases", "users")]
)
def test_bad_namespaces_and_populations_are_refused(store_url: str, namespace: str, population: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^(namespace|population): "):
        PopulationStore.open(store_url, namespace=namespace, population=population)
