"""Gateways get the last exports from the trainer: the bytes that are in the store, by digest, as many as are kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from allele.protocol import commands as c
from allele.protocol.errors import InvalidRequest
from allele.protocol.packed import PACKED, PackedRequest, decode_packed, encode_packed
from allele_rollout.gateway.peers import Peers
from allele_trainer.server.app import Server
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.recent import Recent
from tests.trainer.trainer_parts import Rig, adapter
from tests.trainer.wire_client import MEMBERS, Client


@pytest.fixture
async def client(rig: Callable[..., Rig]) -> AsyncIterator[Client]:
    mine = rig(slots=2)
    mine.trainer.recent = Recent(1 << 20)
    server = Server(mine.trainer, incarnation="first", base_digest="sha256:base", metrics=Metrics())
    async with TestServer(server.app()) as running, aiohttp.ClientSession() as session:
        yield Client(mine, str(running.make_url("")), session)


async def exported(client: Client) -> dict[str, c.ByteRange]:
    await client.reset()
    await client.admit(1)
    done = await client.send("export", c.Export(header=client.header(2), members=MEMBERS))
    return c.ExportDone.model_validate_json(done).weights


async def test_the_bytes_are_those_in_the_store(client: Client) -> None:
    weights = await exported(client)
    digests = ["0" * 64, *(r.digest for r in weights.values()), weights["a"].digest]
    found = decode_packed(await client.send("packed", PackedRequest(digests=tuple(digests))))
    assert len(found) == 2
    assert found == {r.digest: client.rig.store.read(r) for r in weights.values()}
    metrics = await client.get("/metrics")
    assert 'allele_trainer_packed_adapters_total{outcome="found"} 2.0' in metrics
    assert 'allele_trainer_packed_adapters_total{outcome="missing"} 1.0' in metrics


async def test_what_was_exported_before_is_dropped_for_what_is_new(client: Client) -> None:
    client.rig.trainer.recent = Recent(client.rig.shape(adapter()).packed_bytes * 3 // 2)
    weights = await exported(client)
    request = PackedRequest(digests=tuple(r.digest for r in weights.values()))
    assert list(decode_packed(await client.send("packed", request))) == [list(weights.values())[-1].digest]


async def test_a_body_that_is_none_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="digests"):
        await client.post("packed", b'{"digests": 3}')


async def test_a_gateways_peer_gives_what_is_there_and_counts_the_rest(client: Client) -> None:
    weights = await exported(client)
    counts: dict[str, int] = {}
    peers = Peers(client.url, count=lambda outcome, n: counts.update({outcome: counts.get(outcome, 0) + n}))
    digests = [r.digest for r in weights.values()]
    several = await asyncio.gather(*(peers.fetch([d, "f" * 64]) for d in digests), peers.fetch([]))
    await peers.close()
    assert [hashlib.sha256(b).hexdigest() for found in several for b in found.values()] == digests
    assert (counts["found"], counts["missing"]) == (2, 2)


async def test_a_trainer_that_is_away_or_slow_is_waited_for_only_once_in_a_while() -> None:
    asked, counts, now = 0, dict[str, int](), 0.0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    peers = Peers(f"http://127.0.0.1:{port}", count=counts.__setitem__, timeout=0.2, pause=5, clock=lambda: now)
    assert await peers.fetch(["a", "b"]) == {}
    assert (asked, counts["failed"]) == (1, 2)
    assert await peers.fetch(["a"]) == {} and asked == 1
    now = 6.0
    assert await peers.fetch(["a"]) == {} and asked == 2
    await peers.close()
    server.close()


keeps = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=40)


@given(st.integers(0, 100), keeps)
def test_no_more_is_kept_than_there_is_room_for_and_the_newest_stay(
    capacity: int, added: list[tuple[int, int]]
) -> None:
    recent, sizes = Recent(capacity), {}
    order: list[str] = []
    for name, size in added:
        digest = f"{name}-{size}"
        recent.keep(digest, bytes(size))
        sizes[digest] = size
        order = [d for d in order if d != digest] + [digest] * (size <= capacity)
    here = list(recent.find(sizes, most=10**9))
    assert recent.used == sum(sizes[d] for d in here) <= capacity
    room, expected = capacity, set[str]()
    for digest in reversed(order):
        if sizes[digest] > room:
            break
        room -= sizes[digest]
        expected.add(digest)
    assert expected <= set(here)


@given(st.dictionaries(st.text(max_size=64), st.binary(max_size=200), max_size=20))
def test_what_is_encoded_comes_back(found: dict[str, bytes]) -> None:
    assert decode_packed(bytes(encode_packed(found))) == found


def test_an_answer_is_bounded_and_other_bytes_are_refused() -> None:
    recent = Recent(1000)
    for i in range(10):
        recent.keep(str(i), os.urandom(100))
    assert list(recent.find(map(str, range(10)), most=250)) == ["0", "1"]
    with pytest.raises(InvalidRequest, match="expected an Arrow stream"):
        decode_packed(json.dumps({"digest": "data"}).encode())
    assert PACKED.names == ["digest", "data"]
