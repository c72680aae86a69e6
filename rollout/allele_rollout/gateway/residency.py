"""Adapters in the engine: loaded on demand, kept while in use, dropped by the tier's policy.

    hold(adapter) ─► here? pin ────────────────────────────────────────────► its name in the engine ─► unpin
                  └► room in the tier (else wait, misses in their order) ─► pin ─► evict idle ones
                     ─► fetch: disk, peers, store ─► publish: all that has arrived, in one call ─┘

One flight per adapter, however many ask. What is here never waits for what is not. Loads, publications and evictions
that come together go out together.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.residency import TierFull
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.client import EngineGone
from allele_rollout.gateway.publisher import Publisher
from allele_rollout.gateway.source import Source
from allele_rollout.gateway.together import Together

_log = logging.getLogger(__name__)
_FETCHES = 4
"""Batches of bytes on their way at once, from disk and from farther away."""
_AGAIN = 0.5
"""Seconds until an unload is tried again that the engine did not answer."""


class Residency:
    """What one publisher has put into one engine."""

    def __init__(
        self, publisher: Publisher, source: Source, *, slots: int, on_event: Callable[[str, int], None]
    ) -> None:
        """`on_event`: counts adapters loaded, evicted, failed."""
        self.publisher = publisher
        self._source = source
        self._slots = slots
        self._event = on_event
        self._tier = publisher.tier()
        self._resident: dict[str, Adapter] = {}
        """By the engine's name: what is in the tier."""
        self._newest: dict[tuple[str, str, str], Adapter] = {}
        """Newest revision in the tier of each member."""
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._flights: dict[str, asyncio.Future[None]] = {}
        """Of what is being loaded, or is loaded."""
        self._arrived: dict[Adapter, bytes] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._turn = asyncio.Lock()
        self._freed: asyncio.Future[None] | None = None
        """Done when something is next let go; made by the first who waits for that."""
        self._retries: set[asyncio.Task[None]] = set()
        self._near = Together(self._fetch_near, at_once=_FETCHES)
        self._far = Together(self._fetch_far, at_once=_FETCHES)
        self._publications = Together(self._publish)
        self._evictions = Together(self._unload)

    @property
    def capacity(self) -> int:
        """Of the host tier: bytes, or adapters."""
        return self._tier.capacity or self._tier.places or 0

    def sizes(self) -> list[int]:
        """Bytes of each adapter that is loaded or being loaded."""
        return [a.weights.length for a in self._resident.values()]

    def hot(self) -> list[int]:
        """Bytes of those used last, one for each slot: what the engine, which does not tell, has in its slots."""
        return [self._resident[name].weights.length for name in self._recent if name in self._resident]

    async def restore(self) -> None:
        """The engine started again: put in what it held. What is lost is loaded when it is next asked for."""
        for name in await self.publisher.restore():
            flight = self._flights.get(name)
            if flight is not None and flight.done():
                del self._flights[name]
                if not self._tier.pins(name):
                    self._forget(name)

    @asynccontextmanager
    async def hold(self, adapter: Adapter) -> AsyncIterator[str]:
        """The engine's name of an adapter, loaded for as long as the block runs.

        Raises InvalidRequest for one that can never be, and what its load raised.
        """
        name = adapter.engine_name
        await self._pin(adapter)
        try:
            flight = self._flights.get(name)
            if flight is None:
                flight = self._start(adapter)
            await asyncio.shield(flight)
            self._used(name)
            yield name
        finally:
            self._unpin(name)

    async def _pin(self, adapter: Adapter) -> None:
        name, size = adapter.engine_name, self.publisher.size(adapter)
        if self._tier.pin(name):
            return
        if self._tier.capacity is not None and size > self._tier.capacity:
            raise InvalidRequest(f"{adapter.name}: expected at most {self._tier.capacity} bytes, found {size}")
        async with self._turn:
            while True:
                try:
                    evicted = self._tier.admit(name, size=size, pin=True)
                    break
                except TierFull:
                    await asyncio.shield(self._next_freed())
            self._resident[name] = adapter
            self._supersede(adapter)
            for victim in evicted:
                self._evict(victim)

    def _supersede(self, adapter: Adapter) -> None:
        """A new revision takes over its member's uses; the one before is the first to go."""
        before = self._newest.get(adapter.member)
        if before is None or (before.name.revision or 0) < (adapter.name.revision or 0):
            self._newest[adapter.member] = adapter
            if before is not None:
                self._tier.supersede(before.engine_name, adapter.engine_name)

    def _unpin(self, name: str) -> None:
        self._tier.unpin(name)
        if not self._tier.pins(name):
            if name not in self._flights:  # its load failed, or it was lost with the engine
                self._forget(name)
            if self._freed is not None:
                self._freed.set_result(None)
                self._freed = None

    def _next_freed(self) -> asyncio.Future[None]:
        if self._freed is None:
            self._freed = asyncio.get_running_loop().create_future()
        return self._freed

    def _forget(self, name: str) -> None:
        self._tier.remove(name)
        self._left(name)

    def _left(self, name: str) -> None:
        """It is no longer in the tier."""
        adapter = self._resident.pop(name)
        if self._newest.get(adapter.member) == adapter:
            del self._newest[adapter.member]
        self._recent.pop(name, None)

    def _used(self, name: str) -> None:
        self._recent[name] = None
        self._recent.move_to_end(name)
        while len(self._recent) > self._slots:
            self._recent.popitem(last=False)

    def _start(self, adapter: Adapter) -> asyncio.Future[None]:
        flight: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting any more when it fails.
        flight.add_done_callback(lambda f: f.cancelled() or f.exception())
        self._flights[adapter.engine_name] = flight
        # For as long as it is on its way, whether or not somebody still waits.
        self._tier.pin(adapter.engine_name, use=False)
        self._near.add(adapter)
        return flight

    def _settle(self, adapter: Adapter, error: BaseException | None) -> None:
        name = adapter.engine_name
        flight = self._flights[name]
        if error is None:
            flight.set_result(None)
        else:
            del self._flights[name]
            flight.set_exception(error)
        self._event("loaded" if error is None else "failed", 1)
        self._unpin(name)

    async def _fetch_near(self, adapters: list[Adapter]) -> None:
        found: dict[Adapter, bytes] = {}
        try:
            found = await self._source.near(adapters)
        except Exception:
            _log.exception("Reading %d adapters from disk", len(adapters))
        for adapter in adapters:
            if adapter in found:
                self._arrive(adapter, found[adapter])
            else:
                self._far.add(adapter)

    async def _fetch_far(self, adapters: list[Adapter]) -> None:
        left = dict.fromkeys(adapters)
        error: BaseException = ProtocolError("bytes: expected an answer for each adapter, found none")
        try:
            async for adapter, data in self._source.far(adapters):
                del left[adapter]
                if isinstance(data, ProtocolError):
                    self._settle(adapter, data)
                else:
                    self._arrive(adapter, data)
        except Exception as e:
            _log.exception("Fetching %d adapters", len(adapters))
            error = e
        for adapter in left:
            self._settle(adapter, error)

    def _arrive(self, adapter: Adapter, data: bytes) -> None:
        self._arrived[adapter] = data
        self._publications.add(adapter)

    async def _publish(self, adapters: list[Adapter]) -> None:
        found: dict[Adapter, bytes] = {}
        for adapter in adapters:
            if await self._room(adapter):
                found[adapter] = self._arrived.pop(adapter)
            else:  # the holes that are left are too small, and all else is in use
                self._retry(adapter, self._next_freed())
        failed: dict[Adapter, ProtocolError] = await self.publisher.load(found) if found else {}
        for adapter in found:
            if adapter in failed:
                self.publisher.release(adapter)
            self._settle(adapter, failed.get(adapter))

    async def _room(self, adapter: Adapter) -> bool:
        """A place for it with the publisher: what is leaving has to be gone, and holes may be too small."""
        while adapter.engine_name in self._leaving or not self.publisher.reserve(adapter):
            if self._leaving:
                await asyncio.wait(self._leaving.values(), return_when=asyncio.FIRST_COMPLETED)
            elif (victim := self._tier.victim()) is not None:
                self._tier.remove(victim)
                self._evict(victim)
            else:
                return False
        return True

    def _retry(self, adapter: Adapter, freed: asyncio.Future[None]) -> None:
        async def again() -> None:
            await asyncio.shield(freed)
            self._publications.add(adapter)

        task = asyncio.ensure_future(again())
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    def _evict(self, name: str) -> None:
        """It has left the tier; take it out of the engine."""
        self._left(name)
        if self._flights.pop(name, None) is not None:
            self._leaving[name] = asyncio.get_running_loop().create_future()
            self._evictions.add(name)
            self._event("evicted", 1)

    async def _unload(self, names: list[str]) -> None:
        while True:
            try:
                await self.publisher.unload(names)
                break
            except EngineGone:  # what is loaded is put in again when it is back
                await asyncio.sleep(_AGAIN)
            except ProtocolError as e:
                _log.warning("Unload of %d adapters: %s", len(names), e)
                break
        for name in names:
            self._leaving.pop(name).set_result(None)
