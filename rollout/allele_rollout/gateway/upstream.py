"""A tenant's request at the engine: its model found, loaded and pinned while the engine answers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from allele.protocol.adapters import parse_model
from allele.protocol.errors import DigestMismatch, InvalidRequest, NotFound, Unavailable
from allele_rollout.gateway.client import EngineGone, refusal
from allele_rollout.gateway.openai import engine_body, engine_refusal
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.residency import Adapter

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Served:
    """The engine's answer of status 200, still to be read, and the revision that gives it; None is the base."""

    response: aiohttp.ClientResponse
    revision: int | None


@asynccontextmanager
async def served(gateway: Gateway, path: str, body: dict[str, Any]) -> AsyncIterator[Served]:
    """The answer of the body's `model`. Leaving the block before its end cancels the request at the engine.

    The engine reads an adapter's name out of a `model` with a colon, so it sees no other than the one resolved here.
    """
    for attempt in (1, 2):
        async with _resolved(gateway, body["model"]) as (name, revision):
            response = await _forward(gateway, path, engine_body(body, name))
            try:
                if response.status == 200:
                    yield Served(response, revision)
                    return
                reason = refusal(await response.read())
            finally:
                response.close()
        if attempt == 1 and name is not None and "never been loaded" in reason:
            gateway.residency.forget()  # the engine restarted and answers already
            continue
        if response.status in (429, 503):
            raise Unavailable(f"engine: {reason}", retry_after=2.0)
        raise engine_refusal(reason)
    raise AssertionError("the second attempt returns or raises")


async def _forward(gateway: Gateway, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
    try:
        return await gateway.engine.forward(path, body)
    except EngineGone:
        gateway.watch.suspect()
        raise


@asynccontextmanager
async def _resolved(gateway: Gateway, model: str) -> AsyncIterator[tuple[str | None, int | None]]:
    """The engine's name of a model and its revision, loaded and pinned inside the block; None is the base."""
    if model == gateway.settings.base_name:
        yield None, None
        return
    adapters = await meant(gateway, model)
    for adapter in adapters:
        async with gateway.residency.hold([adapter]) as held:
            if adapter in held.names:
                yield held.names[adapter], adapter.name.revision
                return
        error = held.failed[adapter]
        if adapter is adapters[-1] or not isinstance(error, DigestMismatch):
            raise error
        _log.error("Serving the revision before: %s", error)


async def meant(gateway: Gateway, model: str) -> list[Adapter]:
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
