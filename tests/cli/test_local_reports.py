"""In local mode driver and gateway report as to an operator; what matters is said once."""

from __future__ import annotations

import aiohttp
import pytest

from allele.protocol.progress import Probes, Progress
from allele.protocol.serving import GatewayReport, GatewayStatus
from allele_cli.display import Display
from allele_cli.local.reports import Reports
from tests.driver.driver_parts import free_port


def gateway(why: str) -> bytes:
    status = GatewayStatus(
        replica="r",
        engine="Ready",
        engine_version="1",
        publish_path="Native" if why else "Bulk",
        publish_path_message=why,
        base_digest="d",
        tiers=(),
        populations={},
    )
    return GatewayReport(namespace="default", pool="p", status=status).model_dump_json().encode()


def progress(step: int, probes: Probes | None) -> bytes:
    report = Progress(
        namespace="default", run="run", uid="u", epoch=1, phase="Training", step=step, steps=9, probes=probes
    )
    return report.model_dump_json().encode()


async def test_reports_with_the_token_are_shown_and_others_refused(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with Display("default/run") as display:
        reports = Reports(display.show, say=display.say)
        await reports.start(port)

        async def post(path: str, body: bytes, token: str = reports.token) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            async with session.post(f"http://127.0.0.1:{port}{path}", data=body, headers=headers) as answer:
                return answer.status

        failing = Probes(reason="Gap", failing=1, message="m@2: Gap (max gap 0.3)")
        async with aiohttp.ClientSession() as session:
            assert await post("/v1/gateways", gateway("no shared memory"), token="another") == 401
            assert await post("/v1/progress", progress(1, None), token="another") == 401
            for _ in range(3):
                assert await post("/v1/gateways", gateway("no shared memory")) == 204
                assert await post("/v1/progress", progress(2, failing)) == 204
            assert await post("/v1/progress", progress(3, Probes(reason="ProbesPassed", message="all pass"))) == 204
        await reports.stop()
    said = capsys.readouterr().err
    assert said.count("one by one: no shared memory") == 1
    assert said.count("m@2: Gap (max gap 0.3)") == 1 and "all pass" in said
