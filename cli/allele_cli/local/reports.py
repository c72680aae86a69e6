"""Where local driver and gateway report to: the operator's endpoints, shown on the terminal instead of in a status."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from aiohttp import web

from allele.protocol.progress import Progress
from allele.protocol.serving import GatewayReport


class Reports:
    """HTTP endpoints on localhost that take reports with the token they were made with.

    Progress is for `show`; of a gateway `say` gets why it publishes adapters one by one, if it does.
    """

    def __init__(self, show: Callable[[Progress], None], *, say: Callable[[str], None]) -> None:
        self.token = secrets.token_urlsafe(32)
        self.last: Progress | None = None
        self._native = ""
        self._show = show
        self._say = say
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> None:
        app = web.Application()
        app.router.add_post("/v1/progress", self._progress)
        app.router.add_post("/v1/gateways", self._gateway)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def _progress(self, request: web.Request) -> web.Response:
        if not self._trusted(request):
            return _denied()
        self.last = Progress.model_validate_json(await request.read())
        self._show(self.last)
        return web.Response(status=204)

    async def _gateway(self, request: web.Request) -> web.Response:
        if not self._trusted(request):
            return _denied()
        why = GatewayReport.model_validate_json(await request.read()).status.publish_path_message
        if why not in ("", self._native):
            self._say(f"adapters are published one by one: {why}")
        self._native = why
        return web.Response(status=204)

    def _trusted(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"


def _denied() -> web.Response:
    return web.json_response({"code": "Denied", "message": "token not accepted"}, status=401)
