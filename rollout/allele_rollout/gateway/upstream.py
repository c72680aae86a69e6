"""A tenant's request at the engine: its model found, loaded and pinned while the engine answers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp

from allele.protocol.adapters import parse_model
from allele.protocol.errors import DigestMismatch, InvalidRequest, NotExposed, NotFound, ProtocolError, Unavailable
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.client import EngineGone, read_whole, refusal
from allele_rollout.gateway.openai import engine_body, engine_refusal
from allele_rollout.gateway.parts import Gateway

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Served:
    """The engine's answer of status 200."""

    response: aiohttp.ClientResponse
    """Still to be read, if it is a stream."""
    whole: bytes | None
    """All of it, if it is not."""
    revision: int | None
    """That gives it; None is the base."""


@asynccontextmanager
async def served(gateway: Gateway, path: str, body: dict[str, Any]) -> AsyncIterator[Served]:
    """The answer of the body's `model`. Leaving the block before its end cancels the request at the engine.

    The engine reads an adapter's name out of a `model` with a colon, so it sees no other than the one resolved here. An
    engine that dies before it has answered is waited for and asked again.
    """
    answered = False
    for attempt in (1, 2):
        try:
            async with _turn(gateway, body["model"], cost=_sequences(body)) as (name, revision):
                response = await gateway.engine.forward(path, engine_body(body, name))
                try:
                    if response.status == 200:
                        whole = None if body.get("stream") else await read_whole(response)
                        answered = True
                        yield Served(response, whole, revision)
                        return
                    reason = refusal(await response.read())
                finally:
                    response.close()
        except EngineGone:
            gateway.watch.suspect()
            if attempt == 2 or answered:
                raise
        else:
            if attempt == 2 or name is None or "never been loaded" not in reason:
                raise _refused(response.status, reason)
        # The engine died, or started again behind our back.
        await gateway.watch.again()
    raise AssertionError("the second attempt returns or raises")


def _refused(status: int, reason: str) -> ProtocolError:
    if status in (429, 503):
        return Unavailable(f"engine: {reason}", retry_after=2.0)
    return engine_refusal(reason)


@asynccontextmanager
async def _turn(gateway: Gateway, model: str, *, cost: int) -> AsyncIterator[tuple[str | None, int | None]]:
    """The engine's name of a model and its revision, loaded and its turn inside the block; None is the base."""
    if model == gateway.settings.base_name:
        async with gateway.dispatcher.turn(None, cost=cost):
            yield None, None
        return
    adapters = await meant(gateway, model)
    for adapter in adapters:
        async with AsyncExitStack() as stack:
            try:
                if "@" not in model:
                    await gateway.proofs.require(adapter)
                name = await stack.enter_async_context(gateway.dispatcher.turn(adapter, cost=cost))
            except (DigestMismatch, NotExposed) as e:
                if adapter is adapters[-1]:
                    raise
                _log.error("Serving the revision before: %s", e)
                continue
            yield name, adapter.name.revision
            return


def _sequences(body: dict[str, Any]) -> int:
    """That the request runs at once."""
    prompts = body.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    return several * (body.get("n") or 1)


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
