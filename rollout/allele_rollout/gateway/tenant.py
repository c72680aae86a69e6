"""Tenant port: the OpenAI API, with `population/member[@revision]` as `model`.

The engine's own endpoints answer; what is added is the name's meaning, the queue, and a pin on the revision while its
request runs. A client that goes away cancels the handler, which closes the request to the engine, which aborts it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from allele.protocol.adapters import parse_model
from allele.protocol.errors import DigestMismatch, InvalidRequest, NotFound, ProtocolError, Unavailable
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.client import EngineGone, refusal
from allele_rollout.gateway.openai import engine_body, error_body, model_page, parse_body
from allele_rollout.gateway.parts import Gateway

_PAGE = 1000
_log = logging.getLogger(__name__)


def tenant_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[gateway.observe(error_body)], client_max_size=64 << 20)

    async def complete(request: web.Request) -> web.StreamResponse:
        body = parse_body(await request.read())
        async with gateway.tenants.place():
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
        try:
            async with _turn(gateway, body) as name:
                upstream = await gateway.engine.forward(request.path, engine_body(body, name))
                try:
                    if upstream.status == 200:
                        return await _relay(request, upstream, stream=bool(body.get("stream")))
                    reason = refusal(await upstream.read())
                finally:
                    upstream.close()
        except EngineGone:
            gateway.watch.suspect()
            if attempt == 2:
                raise
        else:
            if attempt == 2 or name is None or "never been loaded" not in reason:
                raise _refused(upstream.status, reason)
        # The engine died, or started again behind our back, and the client has seen nothing of an answer.
        await gateway.watch.again()
    raise AssertionError("the second attempt returns or raises")


def _refused(status: int, reason: str) -> ProtocolError:
    if status in (429, 503):
        return Unavailable(f"engine: {reason}", retry_after=2.0)
    return InvalidRequest(f"engine: {reason}")


async def _relay(request: web.Request, upstream: aiohttp.ClientResponse, *, stream: bool) -> web.StreamResponse:
    """The engine's answer: a stream as it comes, anything else when it is whole."""
    kind = upstream.headers["Content-Type"]
    if not stream:
        try:
            return web.Response(body=await upstream.read(), headers={"Content-Type": kind})
        except aiohttp.ClientError as e:
            raise EngineGone(f"engine: gone in the middle of an answer: {e}") from e
    response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientError as e:
        # Too late for a status: breaking the connection is how the client learns that the answer is not whole.
        if request.transport is not None:
            request.transport.abort()
        raise Unavailable(f"engine: gone in the middle of an answer: {e}") from e
    await response.write_eof()
    return response


@asynccontextmanager
async def _turn(gateway: Gateway, body: dict[str, Any]) -> AsyncIterator[str | None]:
    """The engine's name of the model, loaded, and its turn, inside the block; None is the base."""
    model, cost = body["model"], _sequences(body)
    if model == gateway.settings.base_name:
        async with gateway.dispatcher.turn(None, cost=cost):
            yield None
        return
    adapters = await _meant(gateway, model)
    for adapter in adapters:
        async with AsyncExitStack() as stack:
            try:
                name = await stack.enter_async_context(gateway.dispatcher.turn(adapter, cost=cost))
            except DigestMismatch as e:
                if adapter is adapters[-1]:
                    raise
                _log.error("Serving the revision before: %s", e)
                continue
            yield name
            return


def _sequences(body: dict[str, Any]) -> int:
    """Sequences that the request runs at once."""
    n = body.get("n")
    return n if isinstance(n, int) and n > 1 else 1


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
