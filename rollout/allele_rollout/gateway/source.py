"""Bytes of adapters from the nearest place that has them: node disk, peers, the store.

`near` and `far` are asked apart, so that a store that is away does not hold up what the disk has. What came from afar
is written to disk behind the caller's back.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Protocol

from allele.protocol.commands import ByteRange
from allele.protocol.errors import ProtocolError, Unavailable
from allele.store.population import portions
from allele_rollout.gateway.adapter import Adapter, Shelf
from allele_rollout.gateway.disk import DiskTier

_log = logging.getLogger(__name__)
_PORTION = 64 << 20
"""Bytes asked of the store at once; its parts are handed on as they come."""
_PAUSE = 2.0
"""Seconds for which a store that did not answer is not asked."""
_BEHIND = 256 << 20
"""Bytes that may wait to be written to disk; more are not kept there."""

Found = tuple[Adapter, bytes | ProtocolError]


class Peers(Protocol):
    """Others that may have bytes which the store has too."""

    async def fetch(self, digests: Sequence[str]) -> dict[str, bytes]: ...


class Source:
    """Where bytes come from; counts by place with `on_read`."""

    def __init__(
        self,
        disk: DiskTier,
        *,
        peers: Peers | None,
        on_read: Callable[[str, int], None],
        patience: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience`: seconds that the store may take for a portion."""
        self._disk = disk
        self._peers = peers
        self._on_read = on_read
        self._patience = patience
        self._clock = clock
        self._away: tuple[float, Unavailable] | None = None
        """Until when the store is let be, and why."""
        self._behind = 0
        self._writing: set[asyncio.Task[None]] = set()

    async def near(self, adapters: Sequence[Adapter]) -> dict[Adapter, bytes]:
        """What the disk has of them, with the right digests."""
        kept = {a.weights.digest for a in adapters if a.weights.digest in self._disk}
        found = await asyncio.to_thread(self._on_disk, kept) if kept else {}
        return {a: found[a.weights.digest] for a in adapters if a.weights.digest in found}

    async def far(self, adapters: Sequence[Adapter]) -> AsyncIterator[Found]:
        """Bytes with the right digest, or an error, of each; those of peers first."""
        left: dict[str, list[Adapter]] = {}
        for adapter in adapters:
            left.setdefault(adapter.weights.digest, []).append(adapter)
        if self._peers is not None:
            for digest, data in (await self._peers.fetch(list(left))).items():
                if digest not in left:
                    continue
                if (other := await asyncio.to_thread(_sha256, data)) != digest:
                    _log.error("Peer: expected bytes with sha256 %s, found %s: asking the store", digest, other)
                    continue
                self._on_read("peer", len(data))
                self._keep(digest, data)
                for adapter in left.pop(digest):
                    yield adapter, data
        stored = [some[0] for some in left.values()]
        for part in portions(stored, size=lambda a: a.weights.length, most=_PORTION):
            async for adapter, found in self._stored(part):
                for same in left[adapter.weights.digest]:
                    yield same, found

    def _on_disk(self, digests: Collection[str]) -> dict[str, bytes]:
        found = {d: data for d in digests if (data := self._disk.get(d)) is not None}
        for data in found.values():
            self._on_read("disk", len(data))
        return found

    async def _stored(self, adapters: Sequence[Adapter]) -> AsyncIterator[Found]:
        by_shelf: dict[int, tuple[Shelf, list[Adapter]]] = {}
        for adapter in adapters:
            by_shelf.setdefault(id(adapter.shelf), (adapter.shelf, []))[1].append(adapter)
        for shelf, some in by_shelf.values():
            for adapter, data in zip(some, await self._read(shelf, [a.weights for a in some]), strict=True):
                if isinstance(data, ProtocolError):
                    yield adapter, type(data)(f"{adapter.name}: {data}", retry_after=data.retry_after)
                    continue
                self._on_read("store", len(data))
                self._keep(adapter.weights.digest, data)
                yield adapter, data

    async def _read(self, shelf: Shelf, ranges: Sequence[ByteRange]) -> Sequence[bytes | ProtocolError]:
        """A store that does not answer is left alone for a while: who asks then is told at once."""
        if self._away is not None and self._clock() < self._away[0]:
            return [self._away[1]] * len(ranges)
        try:
            async with asyncio.timeout(self._patience):
                found = await shelf.read(ranges)
        except TimeoutError:
            found = [Unavailable(f"store: no answer within {self._patience:g} s", retry_after=_PAUSE)] * len(ranges)
        away = next((f for f in found if isinstance(f, Unavailable)), None)
        self._away = None if away is None else (self._clock() + _PAUSE, away)
        return found

    def _keep(self, digest: str, data: bytes) -> None:
        if self._behind + len(data) > _BEHIND or not self._disk.capacity:
            return
        self._behind += len(data)
        task = asyncio.ensure_future(self._write(digest, data))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, digest: str, data: bytes) -> None:
        try:
            await asyncio.to_thread(self._disk.keep, digest, data)
        except OSError as e:
            _log.warning("Disk tier: %s", e)
        finally:
            self._behind -= len(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
