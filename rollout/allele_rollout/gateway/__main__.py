"""`python -m allele_rollout.gateway`: the only way into the engine beside it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from aiohttp import web

from allele_rollout.gateway.internal import internal_app
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.settings import GatewaySettings, address
from allele_rollout.gateway.tenant import tenant_app


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Both ports, until `stop`; requests under way get a while to finish."""
    gateway = Gateway(settings)
    async with gateway.running():
        runners = []
        for app, listen in ((tenant_app(gateway), settings.listen), (internal_app(gateway), settings.internal)):
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=20)
            await runner.setup()
            await web.TCPSite(runner, *address(listen)).start()
            runners.append(runner)
        await stop.wait()
        await asyncio.gather(*(r.cleanup() for r in runners))


async def _main(argv: list[str]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(GatewaySettings.parse(argv), stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    asyncio.run(_main(sys.argv[1:]))
