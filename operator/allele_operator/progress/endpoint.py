"""`POST` of a report: takes it, or passes it on to the replica that leads.

Drivers and gateways reach any replica through the Service; only the leader reconciles. One that stands by forwards the
request to the holder of the lease, whose identity carries its address (only operators may write the Lease).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import aiohttp
from aiohttp import web

from allele.protocol.errors import ProtocolError, Unavailable
from allele_operator.metrics import Metrics
from allele_operator.progress.caller import Caller, Reviewer, Unauthenticated

log = logging.getLogger(__name__)
_FORWARDED = "X-Allele-Forwarded"
_TOKEN_CHARACTERS = 8192
_FORWARD_SECONDS = 5.0


class Taker(Protocol):
    """What becomes of the reports of one kind."""

    @property
    def path(self) -> str: ...

    def __call__(self, caller: Caller, body: bytes) -> None:
        """Raises Forbidden, InvalidRequest or StaleEpoch."""
        ...


class Endpoint:
    """`leader` gives None while this process leads, else host:port of the one that does ('' if unknown)."""

    def __init__(
        self,
        take: Taker,
        *,
        reviewer: Reviewer,
        leader: Callable[[], str | None],
        metrics: Metrics,
    ) -> None:
        self._take = take
        self._reviewer = reviewer
        self._leader = leader
        self._metrics = metrics

    @property
    def path(self) -> str:
        return self._take.path

    async def post(self, request: web.Request) -> web.Response:
        try:
            leader = self._leader()
            if leader is not None:
                return await self._forward(request, leader)
            self._take(await self._reviewer.identify(_bearer(request)), await request.read())
        except ProtocolError as e:
            self._metrics.reported(type(e).__name__)
            headers = {"Retry-After": str(int(e.retry_after))} if e.retry_after else {}
            return web.Response(
                text=e.reply().model_dump_json(), status=e.status, content_type="application/json", headers=headers
            )
        self._metrics.reported("Accepted")
        return web.json_response({"accepted": True})

    async def _forward(self, request: web.Request, leader: str) -> web.Response:
        if not leader or _FORWARDED in request.headers:
            raise Unavailable("no replica leads at the moment", retry_after=5)
        headers = {"Authorization": request.headers.get("Authorization", ""), _FORWARDED: "1"}
        timeout = aiohttp.ClientTimeout(total=_FORWARD_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(f"http://{leader}{self.path}", data=await request.read(), headers=headers) as answer,
            ):
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        except (aiohttp.ClientError, TimeoutError) as e:
            raise Unavailable(f"the leading replica at {leader} does not answer: {e}", retry_after=5) from e


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not 0 < len(token) <= _TOKEN_CHARACTERS:
        raise Unauthenticated("expected the header Authorization: Bearer <projected token>")
    return token.strip()
