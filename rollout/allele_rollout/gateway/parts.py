"""The parts of a gateway, put together, and what both ports share: errors, counting, health."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from allele.protocol.errors import ProtocolError
from allele.protocol.serving import Tier
from allele.store.objects import Objects
from allele_rollout.gateway.client import EngineClient
from allele_rollout.gateway.limits import Queue
from allele_rollout.gateway.metrics import GatewayMetrics
from allele_rollout.gateway.populations import Populations
from allele_rollout.gateway.residency import Residency
from allele_rollout.gateway.sampler import Sampler
from allele_rollout.gateway.settings import GatewaySettings
from allele_rollout.gateway.warm import FolderCache
from allele_rollout.gateway.watch import EngineWatch

_log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ErrorBody = Callable[[ProtocolError], dict[str, Any]]


class Gateway:
    """Everything behind the two ports. Make it inside a running loop; `running` follows engine and store."""

    def __init__(self, settings: GatewaySettings) -> None:
        s = self.settings = settings
        self.metrics = GatewayMetrics()
        self.engine = EngineClient(s.engine, timeout=s.deadline)
        self.cache = FolderCache(Path(s.cache_dir).absolute(), capacity=s.cache_bytes)
        self.residency = Residency(
            self.engine,
            self.cache,
            capacity=s.max_loaded,
            on_event=lambda event: self.metrics.residency.labels(event).inc(),
        )
        self.watch = EngineWatch(self.engine, on_boot=self.residency.forget)
        self.sampler = Sampler(self.engine, self.residency, self.watch, slots=s.slots)
        self.populations = Populations(
            Objects.open(s.store),
            base_name=s.base_name,
            base_digest=s.base_digest,
            forget_absent=s.tail_seconds,
            clock=time.monotonic,
        )
        self.tenant_queue = Queue(running=s.running, waiting=s.waiting, deadline=s.deadline)
        self.batch_queue = Queue(running=s.batches, waiting=s.waiting_batches, deadline=s.deadline)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tail = self.populations.tail(interval=self.settings.tail_seconds, on_failure=self.metrics.tail_failures.inc)
        tasks = [asyncio.create_task(self.watch.run()), asyncio.create_task(tail)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.engine.close()

    def tiers(self) -> tuple[Tier, ...]:
        """Capacity of `disk` is in bytes, of the others in adapters. The engine fills its slots from what was used
        last; which adapters those are it does not tell."""
        sizes = self.residency.sizes()
        hot = sizes[-self.settings.slots :]
        return (
            Tier(name="hot", adapters=len(hot), bytes=sum(hot), capacity=self.settings.slots),
            Tier(name="host", adapters=len(sizes), bytes=sum(sizes), capacity=self.settings.max_loaded),
            Tier(name="disk", adapters=len(self.cache), bytes=self.cache.size, capacity=self.cache.capacity),
        )

    def measure(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.ready.set(self.watch.state == "Ready")
        self.metrics.queued.labels("tenant").set(self.tenant_queue.inside)
        self.metrics.queued.labels("internal").set(self.batch_queue.inside)
        for tier in self.tiers():
            self.metrics.adapters.labels(tier.name).set(tier.adapters)
            self.metrics.tier_bytes.labels(tier.name).set(tier.bytes)

    def count_sample(self, outcome: str) -> None:
        self.metrics.samples.labels(outcome).inc()

    async def healthz(self, _: web.Request) -> web.Response:
        self.watch.require()
        return web.json_response({"engine": self.watch.state})

    def observe(self, error_body: ErrorBody) -> Any:
        """Middleware: errors become bodies of this port's form; requests are counted and timed by route."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            begun, outcome = time.monotonic(), "cancelled"
            try:
                response = await handler(request)
                outcome = "ok"
                return response
            except web.HTTPException as e:
                outcome = str(e.status)
                raise
            except ProtocolError as e:
                outcome = type(e).__name__
                return _answer(e, error_body)
            except Exception:
                outcome = "internal"
                _log.exception("%s %s failed", request.method, request.path)
                return _answer(ProtocolError("internal error, see the gateway's log"), error_body)
            finally:
                route = request.match_info.route.name or "unknown"
                self.metrics.requests.labels(route, outcome).inc()
                self.metrics.seconds.labels(route).observe(time.monotonic() - begun)

        return middleware


def _answer(error: ProtocolError, error_body: ErrorBody) -> web.Response:
    # Classes of a gateway's own travel under the name of the protocol's class, which clients know.
    known = next(c for c in type(error).__mro__ if c.__module__ == ProtocolError.__module__)
    named = known(str(error), retry_after=error.retry_after, param=error.param)
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    return web.json_response(error_body(named), status=error.status, headers=headers)
