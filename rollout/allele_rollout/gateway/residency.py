"""Adapters registered with the engine: load on demand, keep while in use, drop the least recently used.

    hold(adapters) ─► room for all of them at once? (else wait, first come first served)
                   ─► pin ─► evict idle ones ─► load, one flight per adapter ─► names to send ─► unpin

All adapters of a hold are pinned together or not at all: two requests that each kept a part and waited for the rest
would wait for ever. The engine unloads only when idle, holding a lock that blocks loads, so what is evicted here has
no request in flight.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from allele.protocol.adapters import AdapterName
from allele.protocol.errors import InvalidRequest, ProtocolError
from allele_rollout.gateway.client import EngineRefused
from allele_rollout.gateway.warm import FolderCache, Packed


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A revision, and how to get its bytes."""

    name: AdapterName
    packed: Packed
    length: int
    """Bytes."""
    read: Callable[[], Awaitable[bytes]] = dataclasses.field(compare=False, repr=False)

    @property
    def engine_name(self) -> str:
        """What the engine calls it: with the digest, a population made anew never meets old weights."""
        return f"{self.name}#{self.packed.folder[:16]}"


class Engine(Protocol):
    async def load(self, name: str, folder: str) -> None: ...

    async def unload(self, name: str) -> None: ...


@dataclasses.dataclass
class _Entry:
    adapter: Adapter
    pins: int = 0
    loading: asyncio.Future[None] | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """What a hold got: names for the engine, or why not."""

    names: dict[Adapter, str]
    failed: dict[Adapter, ProtocolError]

    def only(self, adapter: Adapter) -> str:
        """The name of the one adapter held; raises why it could not be loaded."""
        if adapter in self.failed:
            raise self.failed[adapter]
        return self.names[adapter]


class Residency:
    """At most `capacity` adapters registered with the engine."""

    def __init__(self, engine: Engine, cache: FolderCache, *, capacity: int, on_event: Callable[[str], None]) -> None:
        self._engine = engine
        self._cache = cache
        self._capacity = capacity
        self._event = on_event
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._turn = asyncio.Lock()
        self._freed = asyncio.Condition()

    @property
    def adapters(self) -> list[Adapter]:
        """Registered now, least recently used first."""
        return [e.adapter for e in self._entries.values()]

    def forget(self) -> None:
        """The engine restarted: nothing is loaded. Holds of before end without effect."""
        self._entries = OrderedDict()

    @asynccontextmanager
    async def hold(self, adapters: Sequence[Adapter]) -> AsyncIterator[Held]:
        """Keep these loaded inside the block. Raises InvalidRequest for more than the capacity."""
        wanted = {a.engine_name: a for a in adapters}
        if len(wanted) > self._capacity:
            raise InvalidRequest(f"adapters: expected at most {self._capacity} in one batch, found {len(wanted)}")
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self._room(wanted))
            entries = [self._pin(a) for a in wanted.values()]
        try:
            outcomes = await asyncio.gather(*(self._loaded(e) for e in entries), return_exceptions=True)
            yield _held(entries, outcomes)
        finally:
            await asyncio.shield(self._release(entries))

    def _room(self, wanted: dict[str, Adapter]) -> bool:
        pinned = {n for n, e in self._entries.items() if e.pins}
        return len(pinned | wanted.keys()) <= self._capacity

    def _pin(self, adapter: Adapter) -> _Entry:
        entry = self._entries.setdefault(adapter.engine_name, _Entry(adapter))
        entry.pins += 1
        self._entries.move_to_end(adapter.engine_name)
        return entry

    async def _release(self, entries: list[_Entry]) -> None:
        async with self._freed:
            for entry in entries:
                entry.pins -= 1
            self._freed.notify_all()

    async def _loaded(self, entry: _Entry) -> None:
        """Wait until the entry is loaded; the first to ask loads it."""
        if entry.loading is None:
            entry.loading = asyncio.ensure_future(self._load(entry))
            entry.loading.add_done_callback(lambda f: f.cancelled() or f.exception())
        await asyncio.shield(entry.loading)

    async def _load(self, entry: _Entry) -> None:
        adapter = entry.adapter
        try:
            async with self._cache.folder(adapter.packed, adapter.read) as folder:
                await self._make_room()
                if leaving := self._leaving.get(adapter.engine_name):
                    await asyncio.wait([leaving])
                await self._register(adapter.engine_name, folder)
            self._event("loaded")
        except BaseException:
            self._event("failed")
            if self._entries.get(adapter.engine_name) is entry:
                del self._entries[adapter.engine_name]
            raise

    async def _register(self, name: str, folder: Path) -> None:
        try:
            await self._engine.load(name, str(folder))
        except EngineRefused as e:
            if "already loaded" not in str(e):
                raise InvalidRequest(f"adapter {name.partition('#')[0]}: {e}") from e
            # The name holds revision and digest, so what is there under it is right.

    async def _make_room(self) -> None:
        """Unload idle adapters beyond the capacity, least recently used first."""
        while len(self._entries) > self._capacity:
            victim = next((n for n, e in self._entries.items() if not e.pins), None)
            if victim is None:
                return
            del self._entries[victim]
            leaving = self._leaving[victim] = asyncio.ensure_future(self._engine.unload(victim))
            leaving.add_done_callback(lambda _, name=victim: self._leaving.pop(name, None))  # type: ignore[misc]
            await asyncio.shield(leaving)
            self._event("evicted")


def _held(entries: list[_Entry], outcomes: list[BaseException | None]) -> Held:
    failed: dict[Adapter, ProtocolError] = {}
    for entry, outcome in zip(entries, outcomes, strict=True):
        if isinstance(outcome, ProtocolError):
            failed[entry.adapter] = outcome
        elif outcome is not None:
            raise outcome
    names = {e.adapter: e.adapter.engine_name for e in entries if e.adapter not in failed}
    return Held(names=names, failed=failed)
