"""Adapters in memory, a gateway's inside over one engine, and the bare engine's client."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import pathlib
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import numpy as np

from allele.format import adapter_config, export_peft
from allele.protocol.adapters import AdapterName
from allele.protocol.commands import ByteRange
from allele.protocol.errors import ProtocolError
from allele.residency import Schedule
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.arena import Arena
from allele_rollout.gateway.client import EngineClient
from allele_rollout.gateway.disk import DiskTier
from allele_rollout.gateway.dispatch import Dispatcher
from allele_rollout.gateway.publisher import Bulk
from allele_rollout.gateway.residency import Residency
from allele_rollout.gateway.source import Source
from bench.rollout.engines import PROMPT, SHAPE

SCALE = 2.0
CONFIG = json.dumps(adapter_config(SHAPE, scale=SCALE, base_name="tiny"), sort_keys=True).encode()


class Shelf:
    """Random adapters by number, made when first asked for; `delay`: seconds that a read takes."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.reads = 0
        self._data: dict[str, bytes] = {}

    def adapter(self, i: int) -> Adapter:
        data = random_adapter(i)
        where = ByteRange(path=str(i), offset=0, length=len(data), digest=hashlib.sha256(data).hexdigest())
        self._data[where.digest] = data
        return Adapter(AdapterName("bench", "random", f"m{i}", 1), where, CONFIG, shelf=self)

    async def read(self, ranges: Sequence[ByteRange]) -> list[bytes | ProtocolError]:
        self.reads += len(ranges)
        if self.delay:
            await asyncio.sleep(self.delay)
        return [self._data[r.digest] for r in ranges]


def random_adapter(seed: int) -> bytes:
    row = np.random.default_rng(seed).standard_normal(SHAPE.numel, dtype=np.float32) * np.float32(0.1)
    return SHAPE.pack(row)


@contextlib.asynccontextmanager
async def gateway(
    url: str, *, slots: int, capacity: int, quantum: int = 16
) -> AsyncIterator[tuple[EngineClient, Residency, Dispatcher]]:
    """A gateway's way from bytes to the engine, without its ports; `capacity`: bytes of the host tier."""
    client = EngineClient(url, timeout=600)
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(pathlib.Path("/dev/shm"), owner=f"bench-{url.rpartition(':')[2]}", capacity=capacity)
        source = Source(DiskTier(pathlib.Path(folder), capacity=0), peers=None, on_read=lambda *_: None)
        residency = Residency(Bulk(client, arena), source, slots=slots, on_event=lambda *_: None)
        gc.collect()
        gc.freeze()  # as the gateway's process does
        schedule: Schedule[Any] = Schedule(slots=slots, running=1024, quantum=quantum, patience=5.0)
        try:
            yield client, residency, Dispatcher(schedule, hold=residency.hold, deadline=600)
        finally:
            arena.close()
            await client.close()


class BareEngine:
    """What a client does without a gateway: one call an adapter, from PEFT folders on a tmpfs.

    It keeps at most `capacity` adapters in the engine; the least recently used of the idle ones leaves. Requests go to
    the engine as they come.
    """

    def __init__(self, url: str, folder: pathlib.Path, *, capacity: int | None = None) -> None:
        self.client = EngineClient(url, timeout=600)
        self._folder = folder
        self._capacity = capacity
        self._loads: OrderedDict[int, asyncio.Task[None]] = OrderedDict()
        self._users: Counter[int] = Counter()
        self._idle = asyncio.Condition()

    @property
    def loaded(self) -> frozenset[int]:
        return frozenset(self._loads)

    def export(self, i: int) -> None:
        export_peft(random_adapter(i), self._folder / str(i), shape=SHAPE, scale=SCALE, base_name="tiny")

    async def name(self, i: int) -> str:
        """The engine's name of an adapter, loaded by the first who asks."""
        async with self.use(i) as name:
            return name

    @contextlib.asynccontextmanager
    async def use(self, i: int) -> AsyncIterator[str]:
        """Loaded for as long as the block runs."""
        async with self._idle:
            if i not in self._loads:
                await self._idle.wait_for(lambda: i in self._loads or self._victim() is not None or self._has_room())
            if i not in self._loads:
                victim = None if self._has_room() else self._victim()
                leaving = None if victim is None else self._loads.pop(victim)
                self._loads[i] = asyncio.create_task(self._load(i, None if leaving is None else victim))
            self._loads.move_to_end(i)
            self._users[i] += 1
        try:
            await asyncio.shield(self._loads[i])
            yield f"m{i}"
        finally:
            async with self._idle:
                self._users[i] -= 1
                self._idle.notify_all()

    async def unload(self, i: int) -> None:
        del self._loads[i]
        await self.client.unload(f"m{i}")

    def _has_room(self) -> bool:
        return self._capacity is None or len(self._loads) < self._capacity

    def _victim(self) -> int | None:
        return next((i for i in self._loads if not self._users[i]), None)

    async def _load(self, i: int, victim: int | None) -> None:
        if victim is not None:
            await self.client.unload(f"m{victim}")
        await self.client.load(f"m{i}", str(self._folder / str(i)))


async def first_token(
    session: aiohttp.ClientSession, url: str, name: str | None, *, tokens: int
) -> tuple[float, float]:
    """Monotonic times of the first and the last token of a streamed answer."""
    body = {
        "input_ids": list(PROMPT),
        "lora_path": name,
        "stream": True,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    first = 0.0
    async with session.post(f"{url}/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {") and not first:
                first = time.monotonic()
    return first, time.monotonic()
