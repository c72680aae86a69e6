"""The parts of a gateway, put together, and what both ports share: errors, counting, health."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from allele.protocol.errors import ProtocolError, Unavailable
from allele.protocol.serving import Tier
from allele.residency import Schedule
from allele.store.objects import Objects
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.arena import Arena, usual_capacity
from allele_rollout.gateway.client import EngineClient
from allele_rollout.gateway.disk import DiskTier
from allele_rollout.gateway.dispatch import Bound, Dispatcher
from allele_rollout.gateway.metrics import GatewayMetrics
from allele_rollout.gateway.peers import Peers
from allele_rollout.gateway.populations import Populations
from allele_rollout.gateway.probe import own_probe
from allele_rollout.gateway.proofs import Proofs
from allele_rollout.gateway.publisher import Bulk, Native, Publisher, PublishPath
from allele_rollout.gateway.residency import Residency
from allele_rollout.gateway.sampler import Sampler
from allele_rollout.gateway.settings import GatewaySettings
from allele_rollout.gateway.source import Source
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
        self.disk = DiskTier(Path(s.cache_dir).absolute(), capacity=s.cache_bytes)
        self.peers = Peers(s.peer, count=self._count_peer) if s.peer else None
        self.source = Source(self.disk, peers=self.peers, on_read=self._count_read)
        self.watch = EngineWatch(self.engine, attach=self._attach)
        self.dispatcher = Dispatcher(
            Schedule(slots=s.slots, running=s.running, quantum=s.quantum, patience=s.patience),
            hold=self.hold,
            deadline=s.deadline,
            on_wait=self.metrics.wait.observe,
        )
        self.sampler = Sampler(self.engine, self.dispatcher, self.watch)
        self.populations = Populations(
            Objects.open(s.store),
            base_name=s.base_name,
            base_digest=s.base_digest,
            forget_absent=s.tail_seconds,
            clock=time.monotonic,
        )
        self.proofs = Proofs(
            functools.partial(own_probe, populations=self.populations, sampler=self.sampler),
            on_verdict=lambda verdict: self.metrics.probes.labels(verdict).inc(),
            clock=time.monotonic,
        )
        self.tenant_bound = Bound(s.requests)
        self.batch_bound = Bound(s.batches)
        self.residency: Residency | None = None
        self.native_reason = ""
        """Why adapters are not published in bulk; empty when they are."""
        self._arena: Arena | None = None

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
            if self.peers is not None:
                await self.peers.close()
            await self.engine.close()
            if self._arena is not None:
                self._arena.close()

    async def _attach(self) -> None:
        """The engine has started: choose how to publish, take out what is not ours, put in what is."""
        self.proofs.forget()
        self.native_reason = self._no_arena() or await self.engine.bulk()
        path: PublishPath = "Native" if self.native_reason else "Bulk"
        strangers = await self.engine.adapters()
        if path == "Bulk":
            await self.engine.upsert([], strangers)
        else:
            _log.error("Adapters are published one by one: %s", self.native_reason)
            for name in strangers:
                await self.engine.unload(name)
        if self.residency is not None and self.residency.publisher.path == path:
            await self.residency.restore()
        else:
            self.residency = Residency(
                self._publisher(path), self.source, slots=self.settings.slots, on_event=self._count_event
            )

    def _no_arena(self) -> str:
        """Make the arena unless it is there; why there is none."""
        s = self.settings
        if self._arena is None:
            folder = Path(s.host_dir)
            try:
                capacity = s.host_bytes or usual_capacity(folder)
                owner = f"allele-{s.engine.rpartition(':')[2].strip('/')}"
                self._arena = Arena(folder, owner=owner, capacity=capacity)
            except OSError as e:
                return f"host tier: {e}"
        return ""

    def _publisher(self, path: PublishPath) -> Publisher:
        if path == "Bulk":
            assert self._arena is not None
            return Bulk(self.engine, self._arena)
        return Native(self.engine, Path(self.settings.cache_dir) / "peft", places=self.settings.max_loaded)

    def hold(self, adapter: Adapter) -> AbstractAsyncContextManager[str]:
        if self.residency is None:
            raise Unavailable("engine: not attached to yet", retry_after=2.0)
        return self.residency.hold(adapter)

    def cost(self, adapter: Adapter) -> float:
        """The part of the host tier that an adapter takes."""
        residency = self.residency
        if residency is None or not residency.capacity:
            return math.inf
        size = residency.publisher.size(adapter) if residency.publisher.path == "Bulk" else 1
        return size / residency.capacity

    def tiers(self) -> tuple[Tier, ...]:
        """Capacity of `hot` is in adapters, of the others in bytes (of `host` in adapters where they are published one
        by one). The engine does not tell what its slots hold; `hot` is what it was asked for last."""
        residency = self.residency
        hot, sizes = (residency.hot(), residency.sizes()) if residency else ([], [])
        host = (residency.capacity if residency else 0) or 0
        return (
            Tier(name="hot", adapters=len(hot), bytes=sum(hot), capacity=self.settings.slots),
            Tier(name="host", adapters=len(sizes), bytes=sum(sizes), capacity=host),
            Tier(name="disk", adapters=len(self.disk), bytes=self.disk.size, capacity=self.disk.capacity),
        )

    def measure(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.ready.set(self.watch.state == "Ready")
        self.metrics.bulk.set(self.residency is not None and not self.native_reason)
        self.metrics.queued.labels("tenant").set(self.tenant_bound.inside)
        self.metrics.queued.labels("internal").set(self.batch_bound.inside)
        self.metrics.turns.labels("running").set(self.dispatcher.running)
        self.metrics.turns.labels("waiting").set(self.dispatcher.waiting)
        for tier in self.tiers():
            self.metrics.adapters.labels(tier.name).set(tier.adapters)
            self.metrics.tier_bytes.labels(tier.name).set(tier.bytes)

    def _count_read(self, place: str, nbytes: int) -> None:
        self.metrics.reads.labels(place).inc()
        self.metrics.read_bytes.labels(place).inc(nbytes)

    def _count_event(self, event: str, count: int) -> None:
        self.metrics.residency.labels(event).inc(count)

    def _count_peer(self, outcome: str, adapters: int) -> None:
        self.metrics.peer_adapters.labels(outcome).inc(adapters)

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
