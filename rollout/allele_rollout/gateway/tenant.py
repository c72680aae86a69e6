"""Tenant port: the OpenAI API, with `population/member[@revision]` as `model`.

The engine's own endpoints answer; what is added is the name's meaning, the queue, and a pin on the revision while its
request runs. A client that goes away cancels the handler, which closes the request to the engine, which aborts it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from allele.protocol.adapters import parse_model
from allele.protocol.errors import DigestMismatch, InvalidRequest, NotFound, Unavailable
from allele_rollout.gateway.client import EngineGone, refusal
from allele_rollout.gateway.openai import engine_body, error_body, model_page, parse_body
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.residency import Adapter

_PAGE = 1000
_log = logging.getLogger(__name__)


def tenant_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[gateway.observe(error_body)], client_max_size=64 << 20)

    async def complete(request: web.Request) -> web.StreamResponse:
        body = parse_body(await request.read())
        async with gateway.tenant_queue.place():
            gateway.watch.require()
            return await _complete(gateway, request, body)

    async def models(request: web.Request) -> web.Response:
        return web.json_response(await _models(gateway, request))

    app.router.add_post("/v1/chat/completions", complete, name="chat_completions")
    app.router.add_post("/v1/completions", complete, name="completions")
    app.router.add_get("/v1/models", models, name="models")
    app.router.add_get("/healthz", gateway.healthz, name="healthz")
    return app


async def _complete(gateway: Gateway, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    for attempt in (1, 2):
        async with _resolved(gateway, body["model"]) as name:
            upstream = await _forward(gateway, request.path, engine_body(body, name))
            try:
                if upstream.status == 200:
                    return await _relay(request, upstream)
                reason = refusal(await upstream.read())
            finally:
                upstream.close()
        if attempt == 1 and name is not None and "never been loaded" in reason:
            gateway.residency.forget()  # the engine restarted and answers already
            continue
        if upstream.status in (429, 503):
            raise Unavailable(f"engine: {reason}", retry_after=2.0)
        raise InvalidRequest(f"engine: {reason}")
    raise AssertionError("the second attempt returns or raises")


async def _forward(gateway: Gateway, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
    try:
        return await gateway.engine.forward(path, body)
    except EngineGone:
        gateway.watch.suspect()
        raise


async def _relay(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    """The engine's answer as it comes; a stream is passed on chunk by chunk."""
    kind = upstream.headers["Content-Type"]
    response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientError as e:
        # Too late for a status: breaking the connection is how the client learns that the answer is not whole.
        if request.transport is not None:
            request.transport.abort()
        raise EngineGone(f"engine: gone in the middle of an answer: {e}") from e
    await response.write_eof()
    return response


@asynccontextmanager
async def _resolved(gateway: Gateway, model: str) -> AsyncIterator[str | None]:
    """The engine's name of a model, loaded and pinned inside the block; None is the base."""
    if model == gateway.settings.base_name:
        yield None
        return
    adapters = await _meant(gateway, model)
    for adapter in adapters:
        async with gateway.residency.hold([adapter]) as held:
            if adapter in held.names:
                yield held.names[adapter]
                return
        error = held.failed[adapter]
        if adapter is adapters[-1] or not isinstance(error, DigestMismatch):
            raise error
        _log.error("Serving the revision before: %s", error)


async def _meant(gateway: Gateway, model: str) -> list[Adapter]:
    """Adapters that would do, best first. Raises NotFound or NotExposed."""
    try:
        name = parse_model(model, gateway.settings.namespace)
    except InvalidRequest as e:
        raise NotFound(f"{e}, or {gateway.settings.base_name} for the base") from e
    if name.namespace != gateway.settings.namespace:
        raise NotFound(f"{model}: this gateway serves namespace {gateway.settings.namespace}")
    population = await gateway.populations.get(name.namespace, name.population)
    if name.revision is not None:
        return [await population.committed(name.member, name.revision)]
    return await population.exposed(name.member)


async def _models(gateway: Gateway, request: web.Request) -> dict[str, Any]:
    limit_text = request.query.get("limit", str(_PAGE))
    if not limit_text.isdigit() or not 0 < int(limit_text) <= _PAGE:
        raise InvalidRequest(f"limit: expected 1 to {_PAGE}, found {limit_text!r}")
    namespace = gateway.settings.namespace
    names = [gateway.settings.base_name]
    for folder in await gateway.populations.discover(namespace):
        try:
            population = await gateway.populations.get(namespace, folder)
        except (NotFound, InvalidRequest):  # not a population, or one of another base
            continue
        names += (f"{folder}/{member}" for member in population.exposed_members())
    return model_page(names, after=request.query.get("after"), limit=int(limit_text), owner=namespace)
