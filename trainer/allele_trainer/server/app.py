"""The trainer over HTTP: requests of all runs meet in one queue; one thread executes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import prometheus_client
from aiohttp import web
from pydantic import ValidationError

from allele.protocol import commands as c
from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.protocol.packed import ANSWER_BYTES, MEDIA_TYPE, PackedRequest, encode_packed
from allele_trainer.server.executor import Executor
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.parse import encoded
from allele_trainer.server.session import Sessions
from allele_trainer.server.trainer import Trainer

log = logging.getLogger(__name__)

MAX_BODY = 1 << 30


class Server:
    """Handlers; what touches the trainer or its sessions is the executor's."""

    def __init__(self, trainer: Trainer, *, incarnation: str, base_digest: str, metrics: Metrics) -> None:
        self._trainer, self._metrics = trainer, metrics
        self._sessions = Sessions(incarnation)
        self._base_digest = base_digest
        self._executor = Executor(trainer, sessions=self._sessions, base_digest=base_digest, metrics=metrics)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/v1/info", self._info)
        app.router.add_post("/v1/packed", self._packed)
        for name in self._executor.names:
            app.router.add_post(f"/v1/{name}", self._handler(name))
        app.on_startup.append(self._start)
        app.on_cleanup.append(self._stop)
        return app

    def _handler(self, name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            body = await request.read()
            try:
                # Shielded: a driver that hangs up does not leave a command half counted; it asks again and is answered.
                reply = await asyncio.shield(asyncio.wrap_future(self._executor.submit(name, body)))
            except ProtocolError as e:
                return _refusal(name, e, self._metrics)
            except Exception as e:
                return _refusal(name, ProtocolError(f"{name}: {type(e).__name__}: {e}"), self._metrics)
            self._metrics.commands.labels(name, "ok").inc()
            return web.Response(body=reply, content_type="application/json")

        return handle

    def follow(self) -> None:
        """Without HTTP, on ranks other than 0: execute what rank 0 is sent, until it ends."""
        self._executor.follow()

    async def _info(self, _request: web.Request) -> web.Response:
        limits = self._trainer.limits
        info = c.TrainerInfo(
            incarnation=self._sessions.incarnation,
            base_digest=self._base_digest,
            slots=limits.slots,
            wave=limits.wave,
            slots_reason=limits.reason,
            used=self._trainer.used,
            runs=self._sessions.epochs,
            setting=self._trainer.setting,
        )
        return web.Response(body=encoded(info), content_type="application/json")

    async def _packed(self, request: web.Request) -> web.Response:
        try:
            wanted = PackedRequest.model_validate_json(await request.read())
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return _refusal("packed", InvalidRequest(f"{where}: {first['msg']}"), self._metrics)
        found = self._trainer.recent.find(wanted.digests, most=ANSWER_BYTES)
        self._metrics.packed.labels("found").inc(len(found))
        self._metrics.packed.labels("missing").inc(len(set(wanted.digests)) - len(found))
        return web.Response(body=await asyncio.to_thread(encode_packed, found), content_type=MEDIA_TYPE)

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _scrape(self, _request: web.Request) -> web.Response:
        body = prometheus_client.generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def _start(self, _app: web.Application) -> None:
        self._executor.start()

    async def _stop(self, _app: web.Application) -> None:
        await asyncio.to_thread(self._executor.stop)


def _refusal(name: str, error: ProtocolError, metrics: Metrics) -> web.Response:
    metrics.commands.labels(name, type(error).__name__).inc()
    reply = error.reply()
    headers = {} if reply.retry_after is None else {"Retry-After": str(max(1, round(reply.retry_after)))}
    return web.Response(body=encoded(reply), status=error.status, headers=headers, content_type="application/json")
