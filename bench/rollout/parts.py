"""Adapters in memory, a gateway's inside over one engine, and the bare engine's client."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import pathlib
import tempfile
import time
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
async def gateway(url: str, *, slots: int, capacity: int, quantum: int = 16) -> AsyncIterator[tuple[EngineClient, Residency, Dispatcher]]:
    """A gateway's way from bytes to the engine, without its ports; `capacity`: bytes of the host tier."""
    client = EngineClient(url, timeout=600)
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(pathlib.Path("/dev/shm"), owner=f"bench-{url.rpartition(':')[2]}", capacity=capacity)
        source = Source(DiskTier(pathlib.Path(folder), capacity=0), peers=None, on_read=lambda *_: None)
        residency = Residency(Bulk(client, arena), source, slots=slots, on_event=lambda *_: None)
        schedule: Schedule[Any] = Schedule(slots=slots, running=1024, quantum=quantum, patience=5.0)
        try:
            yield client, residency, Dispatcher(schedule, hold=residency.hold, deadline=600)
        finally:
            arena.close()
            await client.close()


class BareEngine:
    """What a client without a gateway does: one call an adapter, from PEFT folders on a tmpfs."""

    def __init__(self, url: str, folder: pathlib.Path, *, delay: float = 0.0) -> None:
        self.client = EngineClient(url, timeout=600)
        self._folder = folder
        self._delay = delay
        self._loads: dict[int, asyncio.Future[None]] = {}

    def export(self, i: int) -> pathlib.Path:
        """The folder of an adapter, made on first use."""
        path = self._folder / str(i)
        if not path.exists():
            export_peft(random_adapter(i), path, shape=SHAPE, scale=SCALE, base_name="tiny")
        return path

    async def name(self, i: int) -> str:
        """The engine's name of an adapter, loaded by the first who asks."""
        flight = self._loads.get(i)
        if flight is None:
            flight = self._loads[i] = asyncio.ensure_future(self._load(i))
        await asyncio.shield(flight)
        return f"m{i}"

    async def unload(self, i: int) -> None:
        del self._loads[i]
        await self.client.unload(f"m{i}")

    async def _load(self, i: int) -> None:
        if self._delay:
            await asyncio.sleep(self._delay)
        await self.client.load(f"m{i}", str(self._folder / str(i)))


async def first_token(session: aiohttp.ClientSession, url: str, name: str | None, *, tokens: int) -> tuple[float, float]:
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
