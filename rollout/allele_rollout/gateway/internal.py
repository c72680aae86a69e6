"""Internal port: what drivers, the operator and Prometheus ask. Never exposed to tenants."""

from __future__ import annotations

from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError

from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.protocol.samples import MEDIA_TYPE
from allele.protocol.serving import AbortReply, AbortRequest, GatewayStatus, ProbeRequest
from allele_rollout.gateway.generate import generate
from allele_rollout.gateway.openapi import internal_document
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.probe import probe
from allele_rollout.gateway.underway import Underway

M = TypeVar("M", bound=BaseModel)


def internal_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[gateway.observe(_error_body)], client_max_size=1 << 30)
    underway = Underway(gateway.engine)
    document = internal_document()

    async def on_generate(request: web.Request) -> web.Response:
        answer = await generate(
            await request.read(),
            populations=gateway.populations,
            sampler=gateway.sampler,
            underway=underway,
            place=gateway.batch_bound.place,
            tells_experts=lambda: gateway.watch.info is not None and gateway.watch.info.experts,
            on_sample=gateway.count_sample,
        )
        return web.Response(body=answer, content_type=MEDIA_TYPE)

    async def on_abort(request: web.Request) -> web.Response:
        wanted = await _body(request, AbortRequest)
        return _json(AbortReply(batches=await underway.abort(wanted.prefix)))

    async def on_probe(request: web.Request) -> web.Response:
        wanted = await _body(request, ProbeRequest)
        async with gateway.batch_bound.place():
            reply = await probe(wanted, populations=gateway.populations, sampler=gateway.sampler)
        population = await gateway.populations.get(wanted.namespace, wanted.population)
        for result in reply.results:
            gateway.metrics.probes.labels(result.verdict).inc()
            if result.verdict == "Passed":
                gateway.proofs.passed(await population.committed(result.member, result.revision))
        return _json(reply)

    async def on_status(_: web.Request) -> web.Response:
        return _json(status(gateway))

    async def on_metrics(_: web.Request) -> web.Response:
        gateway.measure()
        text = generate_latest(gateway.metrics.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def on_openapi(_: web.Request) -> web.Response:
        return web.json_response(document)

    app.router.add_post("/v1/generate", on_generate, name="generate")
    app.router.add_post("/v1/abort", on_abort, name="abort")
    app.router.add_post("/v1/probe", on_probe, name="probe")
    app.router.add_get("/v1/status", on_status, name="status")
    app.router.add_get("/metrics", on_metrics, name="metrics")
    app.router.add_get("/openapi.json", on_openapi, name="openapi")
    app.router.add_get("/healthz", gateway.healthz, name="healthz")
    return app


async def _body(request: web.Request, model: type[M]) -> M:
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as e:
        raise InvalidRequest(f"body: expected a {model.__name__}: {e}") from e


def _json(reply: BaseModel) -> web.Response:
    return web.Response(text=reply.model_dump_json(), content_type="application/json")


def status(gateway: Gateway) -> GatewayStatus:
    return GatewayStatus(
        replica=gateway.settings.replica,
        engine=gateway.watch.state,
        engine_version=gateway.watch.info.version if gateway.watch.info else "",
        publish_path="Bulk" if gateway.residency is not None and not gateway.native_reason else "Native",
        publish_path_message=gateway.native_reason[:512],
        base_digest=gateway.settings.base_digest,
        tiers=gateway.tiers(),
        populations={"/".join(k): p.version for k, p in gateway.populations.opened().items()},
    )


def _error_body(error: ProtocolError) -> dict[str, Any]:
    return error.reply().model_dump()
