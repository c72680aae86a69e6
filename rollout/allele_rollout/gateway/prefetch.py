"""`/v1/prefetch`: revisions that a driver will sample next are loaded before it does, and kept until it has.

Only a hint: what cannot be loaded is left to the request that needs it, which tells the driver why.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.protocol.serving import Prefetch, Prefetched
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.populations import Populations

_log = logging.getLogger(__name__)
Hold = Callable[[Adapter], AbstractAsyncContextManager[Any]]
"""Keeps one adapter loaded inside its block."""


Cost = Callable[[Adapter], float]
"""The part of the tier that an adapter takes; infinite while there is no tier."""
SHARE = 0.5
"""Part of the tier that all announcements together may keep: what is sampled meanwhile needs the rest."""
_ROUNDING = 1e-9


class Prefetches:
    """What runs have announced; `aclose` lets all of it go."""

    def __init__(self, populations: Populations, *, hold: Hold, cost: Cost) -> None:
        self._populations = populations
        self._hold, self._cost = hold, cost
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._kept: dict[str, float] = {}
        """Run → part of the tier."""
        self._turn = asyncio.Lock()

    async def announce(self, wanted: Prefetch) -> Prefetched:
        """Raises NotFound or Unavailable for a population or version that is not there."""
        adapters = await self._adapters(wanted)
        async with self._turn:
            await self._leave(wanted.run)
            adapters, part = self._fitting(adapters, room=SHARE - sum(self._kept.values()))
            if adapters:
                self._kept[wanted.run] = part
                self._tasks[wanted.run] = asyncio.create_task(self._keep(wanted.run, adapters, wanted.seconds))
        return Prefetched(taken=len(adapters))

    async def post(self, request: web.Request) -> web.Response:
        try:
            wanted = Prefetch.model_validate_json(await request.read())
        except ValidationError as e:
            raise InvalidRequest(f"body: expected a Prefetch: {e}") from e
        reply = await self.announce(wanted)
        return web.Response(text=reply.model_dump_json(), content_type="application/json")

    async def aclose(self) -> None:
        await asyncio.gather(*(self._leave(run) for run in list(self._tasks)))

    async def _adapters(self, wanted: Prefetch) -> list[Adapter]:
        if not wanted.targets:
            return []
        population = await self._populations.get(wanted.namespace, wanted.population, version=wanted.version)
        found: dict[Adapter, None] = {}
        for target in wanted.targets:
            with contextlib.suppress(ProtocolError):  # whoever samples it is told
                found[await population.committed(target.member, target.revision)] = None
        return list(found)

    def _fitting(self, adapters: Sequence[Adapter], *, room: float) -> tuple[list[Adapter], float]:
        """The first ones that there is room for, and the part of the tier that they take."""
        part = 0.0
        for i, adapter in enumerate(adapters):
            cost = self._cost(adapter)
            if part + cost > room + _ROUNDING:
                return list(adapters[:i]), part
            part += cost
        return list(adapters), part

    async def _leave(self, run: str) -> None:
        task = self._tasks.pop(run, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep(self, run: str, adapters: Sequence[Adapter], seconds: float) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                    for adapter in adapters:
                        group.create_task(self._keep_one(adapter))
        finally:
            del self._kept[run]

    async def _keep_one(self, adapter: Adapter) -> None:
        """Until it is cancelled."""
        try:
            async with self._hold(adapter):
                await asyncio.Event().wait()
        except ProtocolError as e:
            _log.info("Not loaded ahead: %s: %s", adapter.name, e)
