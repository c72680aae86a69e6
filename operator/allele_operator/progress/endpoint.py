"""`POST /v1/progress`: takes a driver's report, or passes it on to the replica that leads.

Drivers reach any replica through the Service; only the leader reconciles. A replica that stands by forwards the request
to the holder of the lease, whose identity carries its address (only operators may write the Lease).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from allele.protocol.errors import InvalidRequest, ProtocolError, Unavailable
from allele.protocol.progress import Progress
from allele_operator.metrics import Metrics
from allele_operator.planning.model import Ref, World
from allele_operator.progress.caller import Reviewer, Unauthenticated, authorise
from allele_operator.progress.reports import Reports

log = logging.getLogger(__name__)
PATH = "/v1/progress"
_FORWARDED = "X-Allele-Forwarded"
_TOKEN_CHARACTERS = 8192
_FORWARD_SECONDS = 5.0


class ProgressEndpoint:
    """`leader` gives None while this process leads, else host:port of the one that does ('' if unknown)."""

    def __init__(
        self,
        *,
        reviewer: Reviewer,
        reports: Reports,
        world: World,
        reported: Callable[[Ref], None],
        leader: Callable[[], str | None],
        metrics: Metrics,
    ) -> None:
        self._reviewer = reviewer
        self._reports = reports
        self._world = world
        self._reported = reported
        self._leader = leader
        self._metrics = metrics

    async def post(self, request: web.Request) -> web.Response:
        try:
            leader = self._leader()
            if leader is not None:
                return await self._forward(request, leader)
            await self._take(request)
        except ProtocolError as e:
            self._metrics.reported(type(e).__name__)
            headers = {"Retry-After": str(int(e.retry_after))} if e.retry_after else {}
            return web.Response(
                text=e.reply().model_dump_json(), status=e.status, content_type="application/json", headers=headers
            )
        self._metrics.reported("Accepted")
        return web.json_response({"accepted": True})

    async def _take(self, request: web.Request) -> None:
        caller = await self._reviewer.identify(_bearer(request))
        try:
            report = Progress.model_validate_json(await request.read())
        except ValidationError as e:
            first = e.errors()[0]
            field = ".".join(map(str, first["loc"])) or "body"
            raise InvalidRequest(f"progress report: {field}: {first['msg']}") from e
        authorise(caller, report, self._world)
        if self._reports.accept(report):
            self._reported(Ref("RLRun", report.namespace, report.run))

    async def _forward(self, request: web.Request, leader: str) -> web.Response:
        if not leader or _FORWARDED in request.headers:
            raise Unavailable("no replica leads at the moment", retry_after=5)
        headers = {"Authorization": request.headers.get("Authorization", ""), _FORWARDED: "1"}
        timeout = aiohttp.ClientTimeout(total=_FORWARD_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(f"http://{leader}{PATH}", data=await request.read(), headers=headers) as answer,
            ):
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        except (aiohttp.ClientError, TimeoutError) as e:
            raise Unavailable(f"the leading replica at {leader} does not answer: {e}", retry_after=5) from e


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not 0 < len(token) <= _TOKEN_CHARACTERS:
        raise Unauthenticated("expected the header Authorization: Bearer <projected token>")
    return token.strip()
