"""Tenant port: the OpenAI API, with `population/member[@revision]` as `model`.

The engine's own endpoints answer; what is added is the name's meaning, the queue, and a pin on the revision while its
request runs. A client that goes away cancels the handler, which closes the request to the engine, which aborts it.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp
from aiohttp import web

from allele.protocol.errors import InvalidRequest, NotFound
from allele_rollout.gateway.ballot import hold_vote
from allele_rollout.gateway.bodies import ChatRequest, TextRequest
from allele_rollout.gateway.client import EngineGone
from allele_rollout.gateway.openai import BadRequest, error_body, model_entry, model_page, parse_body
from allele_rollout.gateway.openapi import PAGE, REVISION_HEADER, tenant_document
from allele_rollout.gateway.parts import Gateway, Handler
from allele_rollout.gateway.upstream import Served, meant, served


def tenant_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[gateway.observe(error_body), _as_openai], client_max_size=64 << 20)
    document = tenant_document()

    def complete(kind: type[ChatRequest] | type[TextRequest]) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            body, asked = parse_body(await request.read(), kind)
            if asked.vote is not None:
                reply, revision = await hold_vote(gateway, request.path, body, asked, asked.vote)
                return web.json_response(reply, headers=_revision(revision))
            async with gateway.tenant_bound.place():
                gateway.watch.require()
                async with served(gateway, request.path, body) as answer:
                    return await _relay(request, answer)

        return handler

    async def models(request: web.Request) -> web.Response:
        return web.json_response(await _models(gateway, request))

    async def model(request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name != gateway.settings.base_name:
            await meant(gateway, name)
        return web.json_response(model_entry(name, owner=gateway.settings.namespace))

    async def openapi(_: web.Request) -> web.Response:
        return web.json_response(document)

    app.router.add_post("/v1/chat/completions", complete(ChatRequest), name="chat_completions")
    app.router.add_post("/v1/completions", complete(TextRequest), name="completions")
    app.router.add_get("/v1/models", models, name="models")
    app.router.add_get("/v1/models/{model:.+}", model, name="model")
    app.router.add_get("/openapi.json", openapi, name="openapi")
    app.router.add_get("/healthz", gateway.healthz, name="healthz")
    return app


@web.middleware
async def _as_openai(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as OpenAI's clients know them: 400 for a wrong request, and a body for aiohttp's own refusals too."""
    try:
        return await handler(request)
    except InvalidRequest as e:
        raise BadRequest(str(e), param=e.param) from e
    except web.HTTPException as e:
        if e.status >= 400:
            e.content_type = "application/json"
            message = f"{request.method} {request.path}: {e.reason}; /openapi.json describes this port"
            e.text = json.dumps(error_body(InvalidRequest(message)))
        raise


def _revision(revision: int | None) -> dict[str, str]:
    return {} if revision is None else {REVISION_HEADER: str(revision)}


async def _relay(request: web.Request, answer: Served) -> web.StreamResponse:
    """The engine's answer; a stream is passed on chunk by chunk."""
    headers = {"Content-Type": answer.response.headers["Content-Type"], **_revision(answer.revision)}
    if answer.whole is not None:
        return web.Response(body=answer.whole, headers=headers)
    response = web.StreamResponse(headers={**headers, "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for chunk in answer.response.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientError as e:
        # Too late for a status: breaking the connection is how the client learns that the answer is not whole.
        if request.transport is not None:
            request.transport.abort()
        raise EngineGone(f"engine: gone in the middle of an answer: {e}") from e
    await response.write_eof()
    return response


async def _models(gateway: Gateway, request: web.Request) -> dict[str, Any]:
    limit_text = request.query.get("limit", str(PAGE))
    if not (limit_text.isascii() and limit_text.isdigit() and len(limit_text) < 5 and 0 < int(limit_text) <= PAGE):
        raise InvalidRequest(f"limit: expected 1 to {PAGE}, found {limit_text[:80]!r}", param="limit")
    namespace = gateway.settings.namespace
    names = [gateway.settings.base_name]
    for folder in await gateway.populations.discover(namespace):
        try:
            population = await gateway.populations.get(namespace, folder)
        except (NotFound, InvalidRequest):  # not a population, or one of another base
            continue
        names += (f"{folder}/{member}" for member in population.exposed_members())
    return model_page(names, after=request.query.get("after"), limit=int(limit_text), owner=namespace)
