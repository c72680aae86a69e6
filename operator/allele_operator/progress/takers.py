"""Reports of drivers and gateways: read, checked against who sent them, kept, and their object queued if it is news."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from allele.protocol.errors import InvalidRequest
from allele.protocol.progress import Progress
from allele.protocol.serving import GatewayReport
from allele_operator.planning.model import Ref, World
from allele_operator.progress.caller import Caller, authorise, authorise_gateway
from allele_operator.progress.reports import GatewayReports, Reports

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class _Taker:
    path: str
    take: Callable[[Caller, bytes], None]

    def __call__(self, caller: Caller, body: bytes) -> None:
        self.take(caller, body)


def run_taker(reports: Reports, world: World, *, reported: Callable[[Ref], None]) -> _Taker:
    def take(caller: Caller, body: bytes) -> None:
        report = _read(Progress, body)
        authorise(caller, report, world)
        if reports.accept(report):
            reported(Ref("RLRun", report.namespace, report.run))

    return _Taker("/v1/progress", take)


def gateway_taker(reports: GatewayReports, world: World, *, reported: Callable[[Ref], None]) -> _Taker:
    def take(caller: Caller, body: bytes) -> None:
        report = _read(GatewayReport, body)
        pool_uid = authorise_gateway(caller, report, world)
        if reports.accept(pool_uid, caller.pod_uid, report.status):
            reported(Ref("BasePool", report.namespace, report.pool))

    return _Taker("/v1/gateways", take)


def _read(kind: type[R], body: bytes) -> R:
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"])) or "body"
        raise InvalidRequest(f"{kind.__name__}: {field}: {first['msg']}") from e
