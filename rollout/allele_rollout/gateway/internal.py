"""Internal port: what drivers, the operator and Prometheus ask. Never exposed to tenants."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.protocol.samples import MEDIA_TYPE
from allele.protocol.serving import GatewayStatus, ProbeRequest
from allele_rollout.gateway.generate import generate
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.probe import probe


def internal_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[gateway.observe(_error_body)], client_max_size=1 << 30)

    async def on_generate(request: web.Request) -> web.Response:
        data = await request.read()
        async with gateway.batches.place():
            answer = await generate(
                data, populations=gateway.populations, sampler=gateway.sampler, on_sample=gateway.count_sample
            )
        return web.Response(body=answer, content_type=MEDIA_TYPE)

    async def on_probe(request: web.Request) -> web.Response:
        try:
            wanted = ProbeRequest.model_validate_json(await request.read())
        except ValidationError as e:
            raise InvalidRequest(f"body: expected a ProbeRequest: {e}") from e
        async with gateway.batches.place():
            reply = await probe(wanted, populations=gateway.populations, sampler=gateway.sampler)
        for result in reply.results:
            gateway.metrics.probes.labels(result.verdict).inc()
        return web.Response(text=reply.model_dump_json(), content_type="application/json")

    async def on_status(_: web.Request) -> web.Response:
        return web.Response(text=status(gateway).model_dump_json(), content_type="application/json")

    async def on_metrics(_: web.Request) -> web.Response:
        gateway.measure()
        text = generate_latest(gateway.metrics.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.add_post("/v1/generate", on_generate, name="generate")
    app.router.add_post("/v1/probe", on_probe, name="probe")
    app.router.add_get("/v1/status", on_status, name="status")
    app.router.add_get("/metrics", on_metrics, name="metrics")
    app.router.add_get("/healthz", gateway.healthz, name="healthz")
    return app


def status(gateway: Gateway) -> GatewayStatus:
    return GatewayStatus(
        replica=gateway.settings.replica,
        engine=gateway.watch.state,
        engine_version=gateway.watch.info.version if gateway.watch.info else "",
        publish_path="Bulk" if gateway.residency is not None and not gateway.native_reason else "Native",
        publish_path_message=gateway.native_reason,
        base_digest=gateway.settings.base_digest,
        tiers=gateway.tiers(),
        populations={"/".join(k): p.version for k, p in gateway.populations.opened().items()},
    )


def _error_body(error: ProtocolError) -> dict[str, Any]:
    return error.reply().model_dump()
