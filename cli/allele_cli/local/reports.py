"""Where a local driver reports to: the operator's progress endpoint, shown on the terminal instead of in a status."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from aiohttp import web

from allele.protocol.progress import Progress


class Reports:
    """HTTP endpoint on localhost that takes `POST /v1/progress` with the token it was made with."""

    def __init__(self, show: Callable[[Progress], None]) -> None:
        self.token = secrets.token_urlsafe(32)
        self.last: Progress | None = None
        self._show = show
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> None:
        app = web.Application()
        app.router.add_post("/v1/progress", self._report)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def _report(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"code": "Denied", "message": "token not accepted"}, status=401)
        self.last = Progress.model_validate_json(await request.read())
        self._show(self.last)
        return web.Response(status=204)
