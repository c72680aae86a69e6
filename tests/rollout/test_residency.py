"""Residency, dispatcher and sampler against an engine that keeps SGLang's rules, over real shared memory and disk."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from allele.protocol.adapters import AdapterName
from allele.protocol.commands import ByteRange
from allele.protocol.errors import DigestMismatch, InvalidRequest, Overloaded, ProtocolError, Unavailable
from allele.residency import Schedule
from allele.residency.space import PAGE
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.arena import Arena
from allele_rollout.gateway.client import EngineGone, EngineRefused
from allele_rollout.gateway.disk import DiskTier
from allele_rollout.gateway.dispatch import Bound, Dispatcher
from allele_rollout.gateway.publisher import Bulk, Native, Publisher
from allele_rollout.gateway.residency import Residency
from allele_rollout.gateway.sampler import Row, Sampler
from allele_rollout.gateway.source import Source
from allele_rollout.gateway.together import Together

Way = Literal["Bulk", "Native"]
both = pytest.mark.parametrize("way", ["Bulk", "Native"])


class Rules:
    """What SGLang would do, without a model: names are loaded, used, unloaded; anything else is refused."""

    def __init__(self) -> None:
        self.loaded: dict[str, tuple[str, int]] = {}
        self.used: Counter[str] = Counter()
        self.most = self.loads = self.upserts = 0
        self.calls: list[list[str | None]] = []
        self.gone = False
        self.refused: set[str] = set()
        self.removing = asyncio.Event()
        self.removing.set()
        self.truth: dict[str, bytes] = {}
        """Bytes by the name that must have them."""

    async def _work(self) -> None:
        await asyncio.sleep(random.random() / 500)
        if self.gone:
            raise EngineGone("no answer")

    def _add(self, name: str, where: tuple[str, int]) -> None:
        self.loaded[name] = where
        self.loads += 1
        self.most = max(self.most, len(self.loaded))

    async def load(self, name: str, folder: str) -> None:
        await self._work()
        if name.split("#")[0] in self.refused:
            raise EngineRefused("rank too high")
        if name in self.loaded:
            raise EngineRefused(f"{name} is already loaded")
        data = (Path(folder) / "adapter_model.safetensors").read_bytes()
        assert data == self.truth[name], f"{name}: other bytes"
        self._add(name, ("", 0))

    async def unload(self, name: str) -> None:
        await self._work()
        assert not self.used[name], f"{name} was unloaded while in use"
        self.loaded.pop(name, None)

    async def upsert(self, files: Sequence[Mapping[str, Any]], remove: Sequence[str]) -> None:
        self.upserts += 1
        await self._work()
        rows = {name: (f["path"], offset) for f in files for name, offset in f["rows"].items()}
        if bad := [name for name in rows if name.split("#")[0] in self.refused]:
            raise EngineRefused(f"rank too high: {bad}")
        for name, where in rows.items():
            self._add(name, where)
            self.check(name)
        if remove:
            await self.removing.wait()
        for name in remove:
            assert not self.used[name], f"{name} was removed while in use"
            self.loaded.pop(name, None)

    def check(self, name: str) -> None:
        """The engine reads a row whenever the adapter enters a slot: its bytes must not have been written over."""
        path, offset = self.loaded[name]
        if path:
            with open(path, "rb") as f:
                f.seek(offset)
                assert f.read(len(self.truth[name])) == self.truth[name], f"{name}: other bytes"

    async def generate(self, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        self.calls.append(body["lora_path"])
        await asyncio.sleep(0)
        for name in body["lora_path"]:
            if name is not None and name not in self.loaded:
                raise EngineRefused(f"Got LoRA adapter that has never been loaded: {name}")
        if any(9999 in ids for ids in body["input_ids"]):
            raise EngineRefused("input_ids: found 9999")
        return [{"of": (name, tuple(ids))} for name, ids in zip(body["lora_path"], body["input_ids"], strict=True)]


class Shelf:
    """Adapters by number, counting how often their bytes are read."""

    def __init__(self, rules: Rules, *, damaged: frozenset[int] = frozenset(), pages: int = 1) -> None:
        self.reads: Counter[int] = Counter()
        self.batches: list[int] = []
        self.away = asyncio.Event()
        self.away.set()
        self._rules = rules
        self._damaged = damaged
        self._pages = pages
        self._data: dict[str, bytes] = {}

    def __getitem__(self, i: int) -> Adapter:
        size = PAGE * (1 + i % self._pages) - 100
        data = (f"bytes of {i} " * size).encode()[:size]
        digest = hashlib.sha256(data).hexdigest()
        self._data[digest] = data
        where = ByteRange(path=str(i), offset=0, length=len(data), digest=digest)
        adapter = Adapter(AdapterName("team", "styles", f"m{i}", 1), where, b"{}", shelf=self)
        self._rules.truth[adapter.engine_name] = data
        return adapter

    async def read(self, ranges: Sequence[ByteRange]) -> list[bytes | ProtocolError]:
        self.batches.append(len(ranges))
        await self.away.wait()
        await asyncio.sleep(0.001)
        for r in ranges:
            self.reads[int(r.path)] += 1
        return [DigestMismatch("damaged") if int(r.path) in self._damaged else self._data[r.digest] for r in ranges]


class Answering:
    """A watch whose engine is there, and forgot everything when asked again."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def require(self) -> None: ...

    def suspect(self) -> None: ...

    async def again(self) -> None:
        await self._residency.restore()


def residency(rules: Rules, folder: Path, *, way: Way, places: int, disk: int = 1 << 20) -> Residency:
    """`places`: adapters of one page."""
    source = Source(DiskTier(folder / "disk", capacity=disk), peers=None, on_read=lambda *_: None)
    publisher: Publisher = Native(rules, folder / "peft", places=places)
    if way == "Bulk":
        publisher = Bulk(rules, Arena(folder / "shm", owner="test", capacity=places * PAGE))
    return Residency(publisher, source, slots=4, on_event=lambda *_: None)


def dispatcher(tier: Residency, *, slots: int = 2, deadline: float = 60.0) -> Dispatcher:
    schedule: Schedule[Any] = Schedule(slots=slots, running=64, quantum=16, patience=1.0)
    return Dispatcher(schedule, hold=tier.hold, deadline=deadline)


async def use(rules: Rules, tier: Residency, adapter: Adapter, seconds: float = 0.0) -> None:
    async with tier.hold(adapter) as name:
        rules.check(name)
        rules.used[name] += 1
        await asyncio.sleep(seconds)
        rules.check(name)
        rules.used[name] -= 1


@both
@pytest.mark.parametrize("pages", [1, 3])
async def test_whatever_is_held_is_loaded_with_its_own_bytes(way: Way, pages: int, tmp_path: Path) -> None:
    rules, dice = Rules(), random.Random(5)
    shelf = Shelf(rules, pages=pages)
    tier = residency(rules, tmp_path, way=way, places=6)

    async def client() -> None:
        for _ in range(30):
            await use(rules, tier, shelf[dice.randrange(12)], dice.random() / 200)

    await asyncio.wait_for(asyncio.gather(*(client() for _ in range(8))), 60)
    assert rules.most <= 6
    assert max(shelf.reads.values()) == 1, "bytes that are on disk were read again"


@both
async def test_many_who_want_one_adapter_load_it_once(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way=way, places=2)
    await asyncio.gather(*(use(rules, tier, shelf[0]) for _ in range(20)))
    assert rules.loads == 1 and shelf.reads[0] == 1


async def test_what_is_asked_together_is_read_and_published_together(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way="Bulk", places=256)
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(256)))
    assert shelf.batches == [256] and rules.upserts <= 3
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(256, 512)))
    assert rules.upserts <= 10, "evictions went one by one"


async def test_what_is_asked_for_again_while_it_leaves_waits_until_it_has_left(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules, damaged=frozenset({1}), pages=2), residency(rules, tmp_path, way="Bulk", places=4)
    for i in (2, 0, 4):  # a page each, and one is free
        await use(rules, tier, shelf[i])
    rules.removing.clear()
    with pytest.raises(DigestMismatch):
        await use(rules, tier, shelf[1])  # two pages, for which one of them has to leave
    (gone,) = [i for i in (2, 0, 4) if shelf[i].engine_name in tier._leaving]
    again = asyncio.create_task(use(rules, tier, shelf[gone]))
    await asyncio.sleep(0.05)
    assert not again.done()
    rules.removing.set()
    await again
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in (0, 2, 4, 6)))


@pytest.mark.parametrize("turns", range(8))
async def test_nothing_stays_behind_that_comes_as_a_batch_ends(turns: int) -> None:
    done: list[int] = []

    async def work(items: list[int]) -> None:
        await asyncio.sleep(0)
        done.extend(items)

    together = Together(work)
    for i in range(20):
        together.add(i)
        for _ in range(turns):
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert sorted(done) == list(range(20))


@both
async def test_what_is_here_does_not_wait_for_what_is_not(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way=way, places=2)
    await use(rules, tier, shelf[0])
    async with tier.hold(shelf[0]), tier.hold(shelf[1]):
        waiting = asyncio.create_task(use(rules, tier, shelf[2]))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(5), tier.hold(shelf[0]):
            assert not waiting.done()
    await asyncio.wait_for(waiting, 5)


async def test_a_store_that_is_away_does_not_hold_up_what_the_disk_has(tmp_path: Path) -> None:
    rules = Rules()
    shelf = Shelf(rules)
    disk = DiskTier(tmp_path / "disk", capacity=1 << 20)
    disk.keep(shelf[0].weights.digest, rules.truth[shelf[0].engine_name])
    tier = residency(rules, tmp_path, way="Bulk", places=16)
    shelf.away.clear()
    waiting = []
    for i in range(1, 10):
        waiting.append(asyncio.create_task(use(rules, tier, shelf[i])))
        await asyncio.sleep(0.01)
    await asyncio.wait_for(use(rules, tier, shelf[0]), 5)
    assert not any(task.done() for task in waiting)
    shelf.away.set()
    await asyncio.gather(*waiting)


async def test_a_store_that_does_not_answer_is_left_alone_for_a_while(tmp_path: Path) -> None:
    rules, now = Rules(), 0.0
    shelf = Shelf(rules)
    source = Source(
        DiskTier(tmp_path, capacity=0), peers=None, on_read=lambda *_: None, patience=0.05, clock=lambda: now
    )

    async def read(i: int) -> bytes | ProtocolError:
        return await anext(data async for _, data in source.far([shelf[i]]))

    shelf.away.clear()
    assert "no answer within 0.05 s" in str(await read(0))
    shelf.away.set()
    assert isinstance(await read(1), Unavailable) and len(shelf.batches) == 1, "it was asked again at once"
    now = 2.5
    assert isinstance(await read(1), bytes) and isinstance(await read(2), bytes)


@both
async def test_a_failed_load_fails_alone_and_may_be_tried_again(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    tier = residency(rules, tmp_path, way=way, places=4)
    shelf = Shelf(rules, damaged=frozenset({1}))
    rules.refused = {"team/styles/m2@1"}
    for _ in range(3):
        found = await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(4)), return_exceptions=True)
        assert found[0] is None and found[3] is None
        assert isinstance(found[1], DigestMismatch) and "m1@1" in str(found[1])
        assert isinstance(found[2], InvalidRequest) and "rank too high" in str(found[2])
    rules.refused = set()
    await use(rules, tier, shelf[2])
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(10, 14)))


async def test_a_new_revision_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way="Bulk", places=3)
    for _ in range(5):
        await use(rules, tier, shelf[0])
        await use(rules, tier, shelf[1])
    await use(rules, tier, shelf[2])
    new = dataclasses.replace(shelf[3], name=dataclasses.replace(shelf[0].name, revision=2))
    rules.truth[new.engine_name] = rules.truth[shelf[3].engine_name]
    await use(rules, tier, new)
    await use(rules, tier, shelf[4])
    assert {name.split("#")[0] for name in rules.loaded} == {"team/styles/m1@1", "team/styles/m0@2", "team/styles/m4@1"}


async def test_what_can_never_fit_is_refused(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules, pages=3), residency(rules, tmp_path, way="Bulk", places=2)
    with pytest.raises(InvalidRequest, match="expected at most 8192 bytes, found 12288"):
        await use(rules, tier, shelf[2])


@both
async def test_a_caller_that_goes_away_leaves_no_pin(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way=way, places=1)
    tasks = [asyncio.create_task(use(rules, tier, shelf[i], 60)) for i in range(3)]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    rules.used.clear()
    await asyncio.wait_for(use(rules, tier, shelf[7]), 5)


@both
async def test_what_was_resident_is_there_again_after_a_restart_of_the_engine(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way=way, places=8)
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(4)))
    async with tier.hold(shelf[0]):
        rules.gone = True
        with pytest.raises(EngineGone):
            await use(rules, tier, shelf[5])
        rules.gone, rules.loaded, calls = False, {}, rules.upserts
        await tier.restore()
        if way == "Bulk":
            assert len(rules.loaded) == 4 and rules.upserts == calls + 1
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(6)))
    assert max(shelf.reads.values()) <= 2 and shelf.reads[0] == 1


async def test_an_eviction_that_the_engine_did_not_answer_frees_its_bytes_later(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way="Bulk", places=2)
    await asyncio.gather(*(use(rules, tier, shelf[i]) for i in range(2)))
    rules.gone = True
    waiting = asyncio.create_task(use(rules, tier, shelf[2]))
    await asyncio.sleep(0.05)
    rules.gone, rules.loaded = False, {}
    await tier.restore()
    await asyncio.wait_for(waiting, 10)
    assert len(rules.loaded) == 2


async def test_a_turn_that_does_not_come_in_time_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way="Bulk", places=4)
    turns = dispatcher(tier, slots=1, deadline=0.05)
    async with turns.turn(shelf[0], cost=16):
        with pytest.raises(Overloaded, match=r"no turn within 0\.05 s"):
            async with turns.turn(shelf[1]):
                pytest.fail("two adapters over one slot")
        await asyncio.sleep(0.1)  # the deadline is of the wait, not of the work
    assert turns.waiting == turns.running == 0
    async with turns.turn(shelf[1]), turns.turn(None):
        assert turns.running == 2
    bound = Bound(2)
    async with bound.place(2):
        with pytest.raises(Overloaded, match="expected at most 2"):
            async with bound.place():
                pass
    assert bound.inside == 0


def sampler(rules: Rules, tier: Residency) -> Sampler:
    return Sampler(rules, dispatcher(tier), Answering(tier))  # type: ignore[arg-type]


@both
async def test_rows_go_out_by_adapter_and_come_back_in_order(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way=way, places=4)
    rows = [Row(None if i % 4 == 3 else shelf[i % 4], (i,)) for i in range(20)]
    outcomes = await sampler(rules, tier).run(rows, {})
    assert [o["of"][1] for o in outcomes if not isinstance(o, ProtocolError)] == [(i,) for i in range(20)]
    for row, outcome in zip(rows, outcomes, strict=True):
        assert not isinstance(outcome, ProtocolError)
        assert outcome["of"][0] == (row.adapter.engine_name if row.adapter else None)
    assert len(rules.calls) == 4 and all(a == b for names in rules.calls for a, b in itertools.pairwise(names))


async def test_one_bad_row_costs_only_itself(tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way="Bulk", places=2)
    rows = [Row(shelf[0], (9999 if i == 5 else i,)) for i in range(16)]
    outcomes = await sampler(rules, tier).run(rows, {})
    assert [i for i, o in enumerate(outcomes) if isinstance(o, ProtocolError)] == [5]
    assert len(rules.calls) <= 9


@both
async def test_an_engine_that_restarted_unnoticed_gets_its_adapters_again(way: Way, tmp_path: Path) -> None:
    rules = Rules()
    shelf, tier = Shelf(rules), residency(rules, tmp_path, way=way, places=2)
    rows = [Row(shelf[0], (1,)), Row(shelf[1], (2,))]
    asked = sampler(rules, tier)
    await asked.run(rows, {})
    rules.loaded.clear()
    outcomes = await asked.run(rows, {})
    assert not any(isinstance(o, ProtocolError) for o in outcomes)
    assert shelf.reads[0] == 1
