"""The trainer over HTTP: requests of all runs meet in one queue, one worker thread executes them in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import prometheus_client
import torch
from aiohttp import web
from pydantic import BaseModel, ValidationError

from allele.protocol import commands as c
from allele.protocol import samples
from allele.protocol.errors import InvalidRequest, Overloaded, ProtocolError
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.session import Sessions
from allele_trainer.server.trainer import Trainer

log = logging.getLogger(__name__)

MAX_BODY = 1 << 30
MAX_WAITING = 256
"""Commands in the queue; a driver sends one at a time, so this is about a hundred runs."""

COMMANDS: dict[str, type[BaseModel]] = {
    "admit": c.Admit,
    "optim_step": c.OptimStep,
    "export": c.Export,
    "save_state": c.SaveState,
    "evict": c.Evict,
}

M = TypeVar("M", bound=BaseModel)


class Server:
    """Handlers; everything that touches the trainer or its sessions runs on the worker thread."""

    def __init__(self, trainer: Trainer, *, incarnation: str, base_digest: str, metrics: Metrics) -> None:
        self._trainer, self._metrics = trainer, metrics
        self._sessions = Sessions(incarnation)
        self._base_digest = base_digest
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="commands")
        self._waiting = 0
        metrics.slots.set(trainer.limits.slots)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/v1/info", self._info)
        app.router.add_post("/v1/reset", self._handler("reset", self._reset))
        app.router.add_post("/v1/forward_backward", self._handler("forward_backward", self._forward_backward))
        for name in COMMANDS:
            app.router.add_post(f"/v1/{name}", self._handler(name, self._json(name)))
        app.on_cleanup.append(self._stop)
        return app

    def _handler(self, name: str, work: Callable[[bytes], bytes]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            body = await request.read()
            try:
                reply = await self._queued(name, lambda: work(body))
            except ProtocolError as e:
                return _refusal(name, e, self._metrics)
            except Exception as e:
                log.exception("command failed", extra={"command": name})
                return _refusal(name, ProtocolError(f"{name}: {type(e).__name__}: {e}"), self._metrics)
            self._metrics.commands.labels(name, "ok").inc()
            return web.Response(body=reply, content_type="application/json")

        return handle

    async def _queued(self, name: str, work: Callable[[], bytes]) -> bytes:
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} commands wait; retry", retry_after=1.0)
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            # Shielded: a driver that hangs up does not leave a command half counted; it asks again and gets the answer.
            running = asyncio.get_running_loop().run_in_executor(self._worker, self._timed, name, work)
            return await asyncio.shield(running)
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    def _timed(self, name: str, work: Callable[[], bytes]) -> bytes:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._metrics.seconds.labels(name).observe(time.perf_counter() - began)
            self._metrics.used.set(self._trainer.used)
            self._metrics.runs.set(len(self._sessions.epochs))

    def _reset(self, body: bytes) -> bytes:
        command = _parse(c.Reset, body)
        self._sessions.check_epoch(command.run, command.epoch)
        self._trainer.reset(command)
        self._sessions.open(command.run, command.epoch)
        log.info("reset", extra={"run": command.run, "epoch": command.epoch, "members": len(command.members)})
        return _json(
            c.ResetDone(
                incarnation=self._sessions.incarnation,
                slots=self._trainer.limits.slots,
                wave=self._trainer.limits.wave,
                base_digest=self._base_digest,
            )
        )

    def _forward_backward(self, body: bytes) -> bytes:
        command, table = samples.decode(body, c.ForwardBackward, samples.TRAIN)

        def work() -> bytes:
            done = self._trainer.forward_backward(command, table)
            self._metrics.tokens.inc(sum(m.tokens for m in done.members.values()))
            return _json(done)

        return self._once(command.header, "forward_backward", body, work)

    def _json(self, name: str) -> Callable[[bytes], bytes]:
        execute: Callable[[BaseModel], BaseModel] = getattr(self._trainer, name)

        def handle(body: bytes) -> bytes:
            command = _parse(COMMANDS[name], body)

            def work() -> bytes:
                done = execute(command)
                if isinstance(done, c.OptimStepDone):
                    self._metrics.skipped.inc(sum(m.skipped for m in done.members.values()))
                return _json(done)

            return self._once(command.header, name, body, work)  # type: ignore[attr-defined]

        return handle

    def _once(self, header: c.Header, name: str, body: bytes, work: Callable[[], bytes]) -> bytes:
        fingerprint = hashlib.sha256(name.encode() + b"\0" + body).digest()
        reply = self._sessions.execute(header, fingerprint, work)
        log.debug(name, extra={"run": header.run, "epoch": header.epoch, "seq": header.seq})
        return reply

    async def _info(self, _request: web.Request) -> web.Response:
        info = c.TrainerInfo(
            incarnation=self._sessions.incarnation,
            base_digest=self._base_digest,
            slots=self._trainer.limits.slots,
            wave=self._trainer.limits.wave,
            slots_reason=self._trainer.limits.reason,
            used=self._trainer.used,
            runs=self._sessions.epochs,
            torch=torch.__version__,
            megatron_core=importlib.metadata.version("megatron-core"),
            device=str(self._trainer.model.device),
        )
        return web.Response(body=_json(info), content_type="application/json")

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _scrape(self, _request: web.Request) -> web.Response:
        body = prometheus_client.generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def _stop(self, _app: web.Application) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)


def _parse(model: type[M], body: bytes) -> M:
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"])) or "body"
        raise InvalidRequest(f"{field}: {first['msg']}, found {str(first['input'])[:200]!r}") from e


def _json(reply: BaseModel) -> bytes:
    return reply.model_dump_json().encode()


def _refusal(name: str, error: ProtocolError, metrics: Metrics) -> web.Response:
    metrics.commands.labels(name, type(error).__name__).inc()
    reply = error.reply()
    headers = {} if reply.retry_after is None else {"Retry-After": str(max(1, round(reply.retry_after)))}
    return web.Response(body=_json(reply), status=error.status, headers=headers, content_type="application/json")
