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
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from allele.protocol.adapters import AdapterName
from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.residency import Tier
from allele_rollout.gateway.client import EngineRefused
from allele_rollout.gateway.warm import FolderCache, Packed

_log = logging.getLogger(__name__)
LOADS = 4
"""Loads at once: the engine takes one at a time, so more only keep bytes and connections waiting."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A revision, and how to get its bytes."""

    name: AdapterName
    packed: Packed
    read: Callable[[], Awaitable[bytes]] = dataclasses.field(compare=False, repr=False)

    @property
    def engine_name(self) -> str:
        """What the engine calls it: with the digest, a population made anew never meets old weights."""
        return f"{self.name}#{self.packed.folder[:16]}"


class Engine(Protocol):
    async def load(self, name: str, folder: str) -> None: ...

    async def unload(self, name: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Held:
    """What a hold got: names for the engine, or why not."""

    names: dict[Adapter, str]
    failed: dict[Adapter, ProtocolError]


class Residency:
    """At most `capacity` adapters registered with the engine."""

    def __init__(self, engine: Engine, cache: FolderCache, *, capacity: int, on_event: Callable[[str], None]) -> None:
        self._engine = engine
        self._cache = cache
        self._capacity = capacity
        self._event = on_event
        self._slots: Tier[str] = Tier(places=capacity)
        self._flights: dict[str, asyncio.Future[None]] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._sizes: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._freed = asyncio.Condition()
        self._loads = asyncio.Semaphore(LOADS)

    def sizes(self) -> list[int]:
        """Bytes of each adapter registered now, least recently used first."""
        return [self._sizes[name] for name in self._slots.names()]

    def forget(self) -> None:
        """The engine restarted: nothing is loaded. Holds of before end without effect."""
        self._slots = Tier(places=self._capacity)
        self._flights = {}
        self._sizes = {}

    @asynccontextmanager
    async def hold(self, adapters: Sequence[Adapter]) -> AsyncIterator[Held]:
        """Keep these loaded inside the block. Raises InvalidRequest for more than the capacity."""
        wanted = {a.engine_name: a for a in adapters}
        if len(wanted) > self._capacity:
            raise InvalidRequest(f"adapters: expected at most {self._capacity} in one batch, found {len(wanted)}")
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self._has_room(wanted))
            slots, flights = self._slots, self._flights
            for name, adapter in wanted.items():
                self._sizes[name] = adapter.packed.length
                for victim in slots.admit(name, pin=True):
                    self._evict(victim)
        try:
            outcomes = await asyncio.gather(*map(self._loaded, wanted.values()), return_exceptions=True)
            yield _held(list(wanted.values()), outcomes)
        finally:
            await asyncio.shield(self._release(wanted, slots=slots, flights=flights))

    def _has_room(self, wanted: dict[str, Adapter]) -> bool:
        pinned = {name for name in self._slots.names() if self._slots.pins(name)}
        return len(pinned | wanted.keys()) <= self._capacity

    def _evict(self, name: str) -> None:
        self._flights.pop(name, None)
        self._sizes.pop(name, None)
        leaving = self._leaving[name] = asyncio.ensure_future(self._engine.unload(name))
        leaving.add_done_callback(lambda _: self._left(name, leaving))
        self._event("evicted")

    def _left(self, name: str, leaving: asyncio.Future[None]) -> None:
        if self._leaving.get(name) is leaving:
            del self._leaving[name]
        if not leaving.cancelled() and (error := leaving.exception()):
            _log.warning("Unload of %s: %s", name, error)

    async def _release(
        self, wanted: dict[str, Adapter], *, slots: Tier[str], flights: dict[str, asyncio.Future[None]]
    ) -> None:
        async with self._freed:
            for name in wanted:
                slots.unpin(name)
                if name not in flights and not slots.pins(name):  # its load failed
                    slots.remove(name)
            self._freed.notify_all()

    async def _loaded(self, adapter: Adapter) -> None:
        """Wait until it is loaded; the first to ask loads it."""
        name, flights = adapter.engine_name, self._flights
        flight = flights.get(name)
        if flight is None:
            flight = flights[name] = asyncio.ensure_future(self._load(adapter, flights))
            flight.add_done_callback(lambda f: f.cancelled() or f.exception())
        await asyncio.shield(flight)

    async def _load(self, adapter: Adapter, flights: dict[str, asyncio.Future[None]]) -> None:
        name = adapter.engine_name
        try:
            async with self._loads, self._cache.folder(adapter.packed, adapter.read) as folder:
                if leaving := list(self._leaving.values()):
                    await asyncio.wait(leaving)
                await self._register(name, folder)
            self._event("loaded")
        except BaseException:
            self._event("failed")
            flights.pop(name, None)
            raise

    async def _register(self, name: str, folder: Path) -> None:
        try:
            await self._engine.load(name, str(folder))
        except EngineRefused as e:
            if "already loaded" not in str(e):
                raise InvalidRequest(f"adapter {name.partition('#')[0]}: {e}") from e
            # The name holds revision and digest, so what is there under it is right.


def _held(adapters: list[Adapter], outcomes: list[BaseException | None]) -> Held:
    failed: dict[Adapter, ProtocolError] = {}
    for adapter, outcome in zip(adapters, outcomes, strict=True):
        if isinstance(outcome, ProtocolError):
            failed[adapter] = outcome
        elif outcome is not None:
            raise outcome
    return Held(names={a: a.engine_name for a in adapters if a not in failed}, failed=failed)
