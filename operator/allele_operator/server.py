"""The operator's HTTP server: reports, liveness, readiness, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from allele_operator.metrics import Metrics
from allele_operator.progress.endpoint import Endpoint

_REPORT_BYTES = 64 * 1024


async def serve(
    listen: str,
    *,
    endpoints: Sequence[Endpoint],
    metrics: Metrics,
    unhealthy: Callable[[], str],
    unready: Callable[[], str],
) -> tuple[web.AppRunner, int]:
    """The running server and its port. `unhealthy` and `unready` give what is wrong, or ''."""

    def probe(problem: Callable[[], str]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            text = problem()
            return web.Response(text=(text or "ok") + "\n", status=503 if text else 200)

        return answer

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application(client_max_size=_REPORT_BYTES)
    app.add_routes(
        [
            *(web.post(e.path, e.post) for e in endpoints),
            web.get("/healthz", probe(unhealthy)),
            web.get("/readyz", probe(unready)),
            web.get("/metrics", scrape),
        ]
    )
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    site = web.TCPSite(runner, host or "0.0.0.0", int(port))
    await site.start()
    return runner, int(runner.addresses[0][1])
