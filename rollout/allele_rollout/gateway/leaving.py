"""The end of a gateway, in an order in which no request fails.

    SIGTERM ─► unready, connections are closed after their answer ─► settle: Services learn of it
            ─► requests under way finish ─► tenant port closes ─► `/v1/drained` answers ─► internal port closes

The engine beside us gets its SIGTERM at the same moment; its container waits for `/v1/drained` (a preStop hook), or it
would be gone before the requests that it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

_log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_ASIDE = frozenset({"healthz", "status", "metrics", "prefetch", "drained"})
"""Routes whose requests are not waited for; nobody asks the engine for them, or the end itself is what they ask for."""


class Leaving:
    """Follows the requests of both ports; `begin` when the gateway is told to stop."""

    def __init__(self, *, settle: float, finish: float) -> None:
        self._settle, self._finish = settle, finish
        self._begun = False
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._drained = asyncio.Event()

    def watch(self, app: web.Application) -> None:
        """Before the application is set up."""

        @web.middleware
        async def follow(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._follow(request, handler)

        app.middlewares.insert(0, follow)
        app.on_response_prepare.append(self._last_on_its_connection)

    async def begin(self) -> None:
        """Returns when the ports may close."""
        self._begun = True
        _log.info("Leaving: unready, %d requests under way", self._under_way)
        await asyncio.sleep(self._settle)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self._finish)
        if self._under_way:
            _log.warning("%d requests did not finish within %g s", self._under_way, self._finish)

    def drained(self) -> None:
        """The engine is not needed any more."""
        self._drained.set()

    async def when_drained(self, _: web.Request) -> web.Response:
        """Answers when the engine may go."""
        await self._drained.wait()
        return web.json_response({"drained": True})

    async def _follow(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        route = request.match_info.route.name
        if self._begun and route == "healthz":
            return web.json_response({"leaving": True}, status=503)
        if route in _ASIDE:
            return await handler(request)
        self._under_way += 1
        self._idle.clear()
        try:
            return await handler(request)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _last_on_its_connection(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._begun:
            response.force_close()
            response.headers["Connection"] = "close"  # the headers are made already, without it
