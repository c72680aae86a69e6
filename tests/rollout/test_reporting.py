"""A gateway tells how it is with its token, again when that changes, and serves whether or not anybody listens."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allele.protocol.serving import GatewayReport
from allele_rollout.gateway import reporting
from tests.rollout.rollout_engine import free_port
from tests.rollout.rollout_parts import Service, StoredPopulation, call, random_adapter

Start = Callable[..., Service]


class Operator:
    """Takes reports as an operator does, and remembers them with their tokens."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, GatewayReport]] = []
        self.refusing = False
        taken = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/gateways"
                if not taken.refusing:
                    report = GatewayReport.model_validate_json(body)
                    taken.reports.append((self.headers.get("Authorization", ""), report))
                self.send_response(503 if taken.refusing else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait(self, fits: Callable[[str, GatewayReport], bool], *, seconds: float = 30) -> GatewayReport:
        """The first report from now on that fits."""
        seen, deadline = len(self.reports), time.monotonic() + seconds
        while time.monotonic() < deadline:
            for token, report in self.reports[seen:]:
                if fits(token, report):
                    return report
            time.sleep(0.05)
        raise AssertionError(f"no such report; the last was {self.reports[-1:]}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def operator() -> Iterator[Operator]:
    found = Operator()
    yield found
    found.close()


@pytest.fixture
def report_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how often gateways report that start from now on."""

    def set_seconds(seconds: float) -> None:
        usual = reporting.Reporting.__init__.__kwdefaults__
        monkeypatch.setattr(reporting.Reporting.__init__, "__kwdefaults__", {**usual, "every": seconds, "look": 0.05})

    set_seconds(0.5)
    return set_seconds


def test_what_is_loaded_is_told_and_the_token_is_read_anew(
    gateway: Start,
    population: StoredPopulation,
    operator: Operator,
    report_every: Callable[[float], None],
    tmp_path: Path,
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    service = gateway(report=operator.url, report_token_file=str(token), replica="pool-rollout-0")
    version = population.commit({"a": random_adapter(1), "b": random_adapter(2)})
    samples = service.generate([("a", 1, (3, 2)), ("b", 1, (3, 2))], version=version)
    assert not any(s.error for s in samples)
    report = operator.wait(lambda t, r: t == "Bearer first" and r.status.tiers[0].adapters == 2)
    assert (report.namespace, report.pool, report.status.replica) == ("team", "tiny", "pool-rollout-0")
    assert report.status.engine == "Ready" and not report.status.populations
    token.write_text("second")
    operator.wait(lambda t, _: t == "Bearer second")


@pytest.mark.parametrize("how", ["absent", "refusing"])
def test_nobody_who_listens_holds_nothing_up(
    gateway: Start, population: StoredPopulation, operator: Operator, report_every: Callable[[float], None], how: str
) -> None:
    operator.refusing = True
    service = gateway(report=operator.url if how == "refusing" else f"http://127.0.0.1:{free_port()}")
    version = population.commit({"a": random_adapter(1)})
    (sample,) = service.generate([("a", 1, (3, 2))], version=version)
    assert sample.error is None
    assert b"allele_gateway_report_failures_total 0.0" not in call(f"{service.internal}/metrics").body
    operator.refusing = False
    if how == "refusing":
        assert operator.wait(lambda _, r: True).status.tiers[0].adapters == 1, "the next report says it all"


def test_an_engine_that_has_started_is_told_at_once(
    gateway: Start, operator: Operator, report_every: Callable[[float], None]
) -> None:
    report_every(3600)
    gateway(report=operator.url)
    until = time.monotonic() + 10
    while operator.reports[-1][1].status.engine != "Ready":
        assert time.monotonic() < until, operator.reports
        time.sleep(0.05)
    assert operator.reports[0][1].status.engine == "Starting"
