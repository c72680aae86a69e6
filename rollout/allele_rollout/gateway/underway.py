"""Batches under way, so that a driver can give up a step: what waits is dropped, what runs is aborted at the engine.

Closing the connection gives a batch up too, but the engine alone notices that up to four seconds late.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from allele.protocol.errors import ProtocolError
from allele_rollout.gateway.client import EngineClient

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Aborted(ProtocolError):
    """The batch was given up before its end."""


class Underway:
    """Batches of one gateway, by the prefix of their requests' ids."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._given_up: set[str] = set()

    @staticmethod
    def name(prefix: str) -> str:
        """A prefix of its own for a batch below `prefix`: a driver that asks again uses its prefix again."""
        return f"{prefix}{uuid.uuid4().hex}/"

    async def run(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, whose requests have ids below `name`. Raises Aborted when it was given up."""
        task = self._running[name] = asyncio.ensure_future(work)
        try:
            return await task
        except asyncio.CancelledError:
            await asyncio.shield(self._abort(name))
            if name in self._given_up:
                raise Aborted(f"{name}: given up") from None
            raise
        finally:
            del self._running[name]
            self._given_up.discard(name)

    async def abort(self, prefix: str) -> int:
        """Give up all batches below `prefix`; how many there were."""
        found = [name for name in self._running if name.startswith(prefix)]
        self._given_up.update(found)
        for name in found:
            self._running[name].cancel()
        return len(found)

    async def _abort(self, name: str) -> None:
        try:
            (await self._engine.forward("/abort_request", {"rid": name})).release()
        except ProtocolError as e:
            _log.warning("Batch %s runs to its end at the engine: %s", name, e)
