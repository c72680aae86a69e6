"""The operator as a whole: what is made of what, who leads, and how it ends.

    stand by ──lease──► list all ──► workers + kopf + resync + lease renewal ──SIGTERM──► release, exit 0
                                              └──lease lost, fence shut, a task died──► exit at once

A process that has led never stands by again: it exits, and the next one starts from what is in the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from kubernetes.aio.client.api_client import ApiClient

import allele
from allele_operator import logs, server
from allele_operator.cache import Cache
from allele_operator.cluster.errors import ApiError, FenceShut
from allele_operator.cluster.events import EventRecorder
from allele_operator.cluster.kube import Kube
from allele_operator.cluster.lease import Lease, LeaseLost, Times
from allele_operator.cluster.transport import Transport, connect
from allele_operator.handlers import shell
from allele_operator.metrics import Metrics
from allele_operator.planning.model import CHILDREN, PLANNED, Options, Ref
from allele_operator.planning.render.pods import AUDIENCE
from allele_operator.progress.caller import Reviewer
from allele_operator.progress.endpoint import Endpoint
from allele_operator.progress.reports import GatewayReports, Reports
from allele_operator.progress.takers import gateway_taker, run_taker
from allele_operator.reconcile import Reconciler
from allele_operator.settings import Settings
from allele_operator.watching import Watching
from allele_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)
_FIRST_RESYNC_SECONDS = 30.0
_WARM_UP_SECONDS = 1.0
_STOP_SECONDS = 3.0
MakeTransport = Callable[..., Transport]


class NotInstalled(Exception):
    """The API server does not know our kinds."""


class Operator:
    """One process. `api` is for everything but the lease, which has a client of its own (`lease_api`)."""

    def __init__(
        self, settings: Settings, *, api: ApiClient, lease_api: ApiClient, make_transport: MakeTransport = Transport
    ) -> None:
        self.settings = settings
        self.api = api
        self.metrics = Metrics(version=allele.__version__)
        self.lease = _lease(settings, lease_api, self.metrics)
        self.kube = Kube(
            make_transport(api, timeout=settings.request_timeout, fence=self.lease.valid, observe=self.metrics.request)
        )
        self.reports, self.gateways = Reports(), GatewayReports()
        self.queue: WorkQueue[Ref] = WorkQueue(backoff=settings.backoff, longest=settings.backoff_limit)
        self.stop = asyncio.Event()
        self.warm = False
        self.cache = Cache(_options(settings, backend="JobSet"), progress=self.reports.get, gateways=self.gateways.of)
        home = {"kind": "Lease", "metadata": {"namespace": settings.lease_namespace, "name": settings.lease_name}}
        events = EventRecorder(self.kube, instance=self.lease.identity, home=home, lost=self.metrics.event_lost)
        self.reconciler = Reconciler(
            kube=self.kube,
            cache=self.cache,
            queue=self.queue,
            events=events,
            metrics=self.metrics,
            status_interval=settings.status_interval,
            forget=self._forget,
        )
        self.metrics.follow(self._gauges, self.cache.count)

    async def run(self) -> None:
        """Until SIGTERM. LeaseLost, FenceShut or a task's own error end it at once."""
        reviewer = Reviewer(self.kube, audience=AUDIENCE)
        takers = (
            run_taker(self.reports, self.cache, reported=self.reconciler.reported),
            gateway_taker(self.gateways, self.cache, reported=self.queue.add),
        )
        runner, port = await server.serve(
            self.settings.listen,
            endpoints=[Endpoint(t, reviewer=reviewer, leader=self._leader, metrics=self.metrics) for t in takers],
            metrics=self.metrics,
            unhealthy=self.unhealthy,
            unready=self.unready,
        )
        try:
            self._take_signals()
            log.info("standing by", extra={"port": port, "identity": self.lease.identity})
            if await self._until_stop(self.lease.acquire()):
                await self._lead()
        finally:
            await runner.cleanup()

    async def _lead(self) -> None:
        self.metrics.leader.set(1)
        renewal = asyncio.create_task(self.lease.keep(), name="lease")
        work = asyncio.create_task(self._work(), name="work")
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await _first({renewal, work, stopped})
            if not self.stop.is_set():
                raise RuntimeError("the operator's tasks ended without being asked to")
            log.info("stopping")
        finally:
            for task in (stopped, work, renewal):
                task.cancel()
            await asyncio.wait({stopped, work, renewal}, timeout=_STOP_SECONDS)
            await self.lease.release()  # after the last write: it shuts the fence

    async def _work(self) -> None:
        while True:
            try:
                await self._warm_up()
                break
            except ApiError as e:  # the server may be starting, or still learning our kinds
                log.warning("the cluster could not be listed, again in %g s: %s", _WARM_UP_SECONDS, e)
                await asyncio.sleep(max(_WARM_UP_SECONDS, e.retry_after))
        tasks = self._start()
        try:
            await _first(set(tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_STOP_SECONDS)

    async def _warm_up(self) -> None:
        for kind in PLANNED:
            if not await self.kube.serves(kind):
                raise NotInstalled(f"the API server does not serve {kind}: install the CRDs (crds.enabled=true)")
        backend = await self._backend()
        self.cache.options = _options(self.settings, backend=backend)
        self._kinds = [k for k in (*PLANNED, *CHILDREN) if k != "JobSet" or backend == "JobSet"]
        self._watching = Watching(
            kube=self.kube,
            cache=self.cache,
            reconciler=self.reconciler,
            metrics=self.metrics,
            kinds=self._kinds,
            namespaces=self.settings.namespace,
        )
        await self._watching.list_all()
        self.warm, self.cache.listening = True, datetime.now(UTC)
        log.info("leading", extra={"backend": backend, "objects": self.cache.count()})

    async def _backend(self) -> str:
        if self.settings.backend != "Auto":
            return self.settings.backend
        return "JobSet" if await self.kube.serves("JobSet") else "Job"

    def _start(self) -> list[asyncio.Task[None]]:
        workers = [
            asyncio.create_task(self.queue.work(self.reconciler.reconcile), name=f"worker-{i}")
            for i in range(self.settings.workers)
        ]
        resync = self._watching.resync(first=_FIRST_RESYNC_SECONDS, every=self.settings.resync)
        registry = shell.registry(
            kinds=self._kinds,
            on_event=self._watching.on_event,
            login=lambda: shell.connection(self.api.configuration),
        )
        watch = shell.watch(
            registry=registry,
            settings=shell.kopf_settings([k for k in self._kinds if k in CHILDREN]),
            namespaces=self.settings.namespace,
            stop=self.stop,
            started=self._take_signals,
        )
        return [*workers, asyncio.create_task(resync, name="resync"), asyncio.create_task(watch, name="kopf")]

    async def _until_stop(self, work: Coroutine[None, None, None]) -> bool:
        """False when SIGTERM came first."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(self.stop.wait())
        await _first({task, stopped})
        stopped.cancel()
        if task.done():
            return True
        task.cancel()
        return False

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop.set)

    def unhealthy(self) -> str:
        """For liveness: a restart is what helps."""
        if self.lease.leading and not self.lease.valid():
            return "the lease was not renewed in time"
        if self.queue.oldest > self.settings.stuck_after:
            return f"an object has waited for {self.queue.oldest:.0f} s"
        return ""

    def unready(self) -> str:
        """Standing by is ready too: reports are passed on to the leader, and rollouts of the operator need it."""
        return "" if self.warm or not self.lease.leading else "listing the cluster"

    def _leader(self) -> str | None:
        if self.lease.leading and self.warm:
            return None
        return _address(self.lease.holder) if not self.lease.leading else ""

    def _forget(self, uid: str) -> None:
        self.reports.forget(uid)
        self.gateways.forget(uid)

    def _gauges(self) -> dict[str, float]:
        return {
            "queue_depth": self.queue.depth,
            "queue_failing": self.queue.failing,
            "queue_oldest_seconds": self.queue.oldest,
            "reports": len(self.reports),
        }


async def _first(tasks: set[asyncio.Task[Any]]) -> None:
    """Returns when one of them ends; its error is raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _options(settings: Settings, *, backend: str) -> Options:
    return Options(
        operator_url=settings.operator_url,
        image=settings.image,
        backend="JobSet" if backend == "JobSet" else "Job",
        cluster_domain=settings.cluster_domain,
        pull_policy=settings.image_pull_policy,
    )


def _lease(settings: Settings, api: ApiClient, metrics: Metrics) -> Lease:
    transport = Transport(api, timeout=settings.lease_timeout, fence=lambda: True, observe=metrics.request)
    return Lease(
        Kube(transport),
        namespace=settings.lease_namespace,
        name=settings.lease_name,
        identity=f"{os.uname().nodename[:63]}/{settings.advertise}/{uuid.uuid4().hex[:8]}",
        times=Times(
            duration=settings.lease_duration, renew_deadline=settings.renew_deadline, retry=settings.lease_retry
        ),
    )


def _address(identity: str) -> str:
    """host:port inside a lease identity, '' if it has none."""
    parts = identity.split("/")
    return parts[1] if len(parts) == 3 else ""


async def main(settings: Settings, *, make_transport: MakeTransport = Transport) -> int:
    """Exit status: 0 after SIGTERM, 3 when leadership was lost, 1 when the cluster lacks our kinds."""
    logs.configure(settings.log_level)
    api, lease_api = await connect(settings.kubeconfig), await connect(settings.kubeconfig, connections=2)
    try:
        await Operator(settings, api=api, lease_api=lease_api, make_transport=make_transport).run()
    except (LeaseLost, FenceShut) as e:
        log.error("leadership lost, exiting: %s", e)
        return 3
    except NotInstalled as e:
        log.error("%s", e)
        return 1
    finally:
        await api.close()
        await lease_api.close()
    return 0
