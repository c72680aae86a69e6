"""Residency against an engine that keeps SGLang's rules, and the disk tier against a real folder."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from allele.protocol.adapters import AdapterName
from allele.protocol.errors import DigestMismatch, InvalidRequest, Overloaded, ProtocolError
from allele_rollout.gateway.client import EngineRefused
from allele_rollout.gateway.residency import Adapter, Residency
from allele_rollout.gateway.sampler import Row, Sampler
from allele_rollout.gateway.warm import WEIGHTS, FolderCache, Packed


class Rules:
    """What SGLang would do, without a model: names are loaded, used, unloaded; anything else is refused."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.used: Counter[str] = Counter()
        self.most = self.loads = self.attempts = 0
        self.calls: list[list[str | None]] = []

    async def load(self, name: str, folder: str) -> None:
        self.attempts += 1
        await asyncio.sleep(random.random() / 500)
        assert (Path(folder) / WEIGHTS).exists(), "the folder vanished while it was being loaded"
        if name in self.loaded:
            raise EngineRefused(f"{name} is already loaded")
        self.loaded.add(name)
        self.loads += 1
        self.most = max(self.most, len(self.loaded))

    async def unload(self, name: str) -> None:
        assert not self.used[name], f"{name} was unloaded while in use"
        await asyncio.sleep(random.random() / 500)
        self.loaded.discard(name)

    async def generate(self, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        self.calls.append(body["lora_path"])
        for name in body["lora_path"]:
            if name is not None and name not in self.loaded:
                raise EngineRefused(f"Got LoRA adapter that has never been loaded: {name}")
        if any(9999 in ids for ids in body["input_ids"]):
            raise EngineRefused("input_ids: found 9999")
        return [{"of": (name, tuple(ids))} for name, ids in zip(body["lora_path"], body["input_ids"], strict=True)]


class Answering:
    """A watch whose engine is there."""

    def require(self) -> None: ...

    def suspect(self) -> None: ...


class Shelf:
    """Adapters by number, counting how often their bytes are read."""

    def __init__(self, *, damaged: frozenset[int] = frozenset()) -> None:
        self.reads: Counter[int] = Counter()
        self._damaged = damaged

    def __getitem__(self, i: int) -> Adapter:
        data = f"bytes of {i}".encode() * 10

        async def read() -> bytes:
            self.reads[i] += 1
            await asyncio.sleep(0.001)
            return data[:-1] if i in self._damaged else data

        packed = Packed(digest=hashlib.sha256(data).hexdigest(), length=len(data), config=b"{}")
        return Adapter(AdapterName("team", "styles", f"m{i}", 1), packed, read)


def entries(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


def residency(rules: Rules, folder: Path, *, capacity: int, disk: int = 1 << 20) -> Residency:
    return Residency(rules, FolderCache(folder, capacity=disk), capacity=capacity, on_event=lambda _: None)


async def test_whatever_is_held_is_loaded_and_no_more_than_the_capacity(tmp_path: Path) -> None:
    rules, shelf, dice = Rules(), Shelf(), random.Random(5)
    tier = residency(rules, tmp_path, capacity=4)

    async def client() -> None:
        for _ in range(15):
            wanted = [shelf[i] for i in dice.sample(range(9), dice.randint(1, 4))]
            async with tier.hold(wanted) as held:
                assert not held.failed
                for name in held.names.values():
                    assert name in rules.loaded
                    rules.used[name] += 1
                await asyncio.sleep(dice.random() / 200)
                for name in held.names.values():
                    rules.used[name] -= 1

    await asyncio.wait_for(asyncio.gather(*(client() for _ in range(8))), 60)
    assert rules.most <= 4 and len(rules.loaded) <= 4
    assert max(shelf.reads.values()) == 1, "bytes that are on disk were read again"


async def test_many_who_want_one_adapter_load_it_once(tmp_path: Path) -> None:
    rules, shelf = Rules(), Shelf()
    tier = residency(rules, tmp_path, capacity=2)

    async def client() -> None:
        async with tier.hold([shelf[0]]) as held:
            assert held.names[shelf[0]] in rules.loaded

    await asyncio.gather(*(client() for _ in range(20)))
    assert rules.attempts == 1 and shelf.reads[0] == 1


async def test_a_failed_load_fails_alone_and_may_be_tried_again(tmp_path: Path) -> None:
    rules = Rules()
    tier = residency(rules, tmp_path, capacity=2)
    bad, good = Shelf(damaged=frozenset({1})), Shelf()
    for _ in range(3):
        async with tier.hold([bad[0], bad[1]]) as held:
            assert list(held.names) == [bad[0]]
            assert isinstance(held.failed[bad[1]], DigestMismatch)
    async with tier.hold([good[1], good[2]]) as held:
        assert len(held.names) == 2
    with pytest.raises(InvalidRequest, match="at most 2"):
        async with tier.hold([good[i] for i in range(3)]):
            pass


async def test_a_caller_that_goes_away_leaves_no_pin(tmp_path: Path) -> None:
    rules, shelf = Rules(), Shelf()
    tier = residency(rules, tmp_path, capacity=1)

    async def client(i: int) -> None:
        async with tier.hold([shelf[i]]):
            await asyncio.sleep(60)

    tasks = [asyncio.create_task(client(i)) for i in range(3)]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(5):
        async with tier.hold([shelf[7]]) as held:
            assert list(held.names) == [shelf[7]]


async def test_bytes_damaged_on_disk_are_read_from_the_store_again(tmp_path: Path) -> None:
    shelf = Shelf()
    cache = FolderCache(tmp_path, capacity=1 << 20)
    async with cache.folder(shelf[0].packed, shelf[0].read) as folder:
        (folder / WEIGHTS).write_bytes(b"something else")
    async with cache.folder(shelf[0].packed, shelf[0].read) as folder:
        assert hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() == shelf[0].packed.digest
    assert shelf.reads[0] == 2


async def test_the_disk_tier_stays_within_its_bytes_and_survives_a_crash(tmp_path: Path) -> None:
    shelf = Shelf()
    cache = FolderCache(tmp_path, capacity=350)
    for i in range(6):
        async with cache.folder(shelf[i].packed, shelf[i].read):
            pass
    assert len(entries(tmp_path)) == len(cache) == 3 and cache.size <= 350
    (tmp_path / ".tmp-left-by-a-crash").mkdir()
    again = FolderCache(tmp_path, capacity=350)
    assert len(again) == len(entries(tmp_path)) == 3
    async with again.folder(shelf[5].packed, shelf[5].read):
        assert shelf.reads[5] == 1
        with pytest.raises(Overloaded):
            async with again.folder(Packed(digest="d", length=400, config=b""), shelf[0].read):
                pass


async def test_rows_go_out_grouped_and_come_back_in_order(tmp_path: Path) -> None:
    rules, shelf = Rules(), Shelf()
    sampler = Sampler(rules, residency(rules, tmp_path, capacity=4), Answering(), slots=2)  # type: ignore[arg-type]
    rows = [Row(None if i % 4 == 3 else shelf[i % 4], (i,)) for i in range(20)]
    outcomes = await sampler.run(rows, {})
    assert [o["of"][1] for o in outcomes if not isinstance(o, ProtocolError)] == [(i,) for i in range(20)]
    for row, outcome in zip(rows, outcomes, strict=True):
        assert not isinstance(outcome, ProtocolError)
        assert outcome["of"][0] == (row.adapter.engine_name if row.adapter else None)
    assert len(rules.calls) == 2
    for names in rules.calls:
        changes = sum(a != b for a, b in itertools.pairwise(names))
        assert changes == len(set(names)) - 1 <= 1


async def test_one_bad_row_costs_only_itself(tmp_path: Path) -> None:
    rules, shelf = Rules(), Shelf()
    sampler = Sampler(rules, residency(rules, tmp_path, capacity=2), Answering(), slots=2)  # type: ignore[arg-type]
    rows = [Row(shelf[0], (9999 if i == 5 else i,)) for i in range(16)]
    outcomes = await sampler.run(rows, {})
    assert [i for i, o in enumerate(outcomes) if isinstance(o, ProtocolError)] == [5]
    assert len(rules.calls) <= 9


async def test_an_engine_that_restarted_unnoticed_gets_its_adapters_again(tmp_path: Path) -> None:
    rules, shelf = Rules(), Shelf()
    sampler = Sampler(rules, residency(rules, tmp_path, capacity=2), Answering(), slots=2)  # type: ignore[arg-type]
    rows = [Row(shelf[0], (1,)), Row(shelf[1], (2,))]
    await sampler.run(rows, {})
    rules.loaded.clear()
    outcomes = await sampler.run(rows, {})
    assert not any(isinstance(o, ProtocolError) for o in outcomes)
    assert rules.loads == 4 and shelf.reads[0] == 1
