"""`python -m allele_rollout.gateway`: the only way into the engine beside it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from aiohttp import web

from allele_rollout.gateway.internal import internal_app, status
from allele_rollout.gateway.leaving import Leaving
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.prefetch import Prefetches
from allele_rollout.gateway.reporting import Reporting
from allele_rollout.gateway.settings import GatewaySettings, address
from allele_rollout.gateway.tenant import tenant_app


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Both ports, until `stop`; see `leaving` for what comes then."""
    gateway = Gateway(settings)
    leaving = Leaving(settle=settings.settle_seconds, finish=settings.finish_seconds)
    prefetches = Prefetches(gateway.populations, hold=gateway.hold, cost=gateway.cost)
    async with gateway.running(), _reporting(gateway), aclosing(prefetches):
        tenant, internal = tenant_app(gateway), internal_app(gateway)
        internal.router.add_get("/v1/drained", leaving.when_drained, name="drained")
        internal.router.add_post("/v1/prefetch", prefetches.post, name="prefetch")
        runners = []
        for app, listen in ((tenant, settings.listen), (internal, settings.internal)):
            leaving.watch(app)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
            await runner.setup()
            await web.TCPSite(runner, *address(listen)).start()
            runners.append(runner)
        # What is there now stays: a full collection would walk all of it, and every request waits meanwhile.
        gc.collect()
        gc.freeze()
        await stop.wait()
        await leaving.begin()
        await runners[0].cleanup()
        leaving.drained()
        await runners[1].cleanup()


@asynccontextmanager
async def _reporting(gateway: Gateway) -> AsyncIterator[None]:
    settings = gateway.settings
    if not settings.report:
        yield
        return
    reporting = Reporting(
        settings.report,
        Path(settings.report_token_file) if settings.report_token_file else None,
        namespace=settings.namespace,
        pool=settings.base_name,
        status=lambda: status(gateway),
        on_failure=gateway.metrics.report_failures.inc,
    )
    task = asyncio.create_task(reporting.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _main(argv: list[str]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(GatewaySettings.parse(argv), stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    asyncio.run(_main(sys.argv[1:]))
