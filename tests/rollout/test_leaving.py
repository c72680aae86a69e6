"""A gateway that is told to stop leaves its Service first: no request fails, and the engine is needed to the last."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rollout.rollout_engine import SLOTS, EngineProcess, free_port
from tests.rollout.rollout_parts import BASE_DIGEST, Answer, Service, call

SETTLE = 2.0


@pytest.fixture
def leaving(engine: EngineProcess, tmp_path: Path) -> Iterator[tuple[Service, subprocess.Popen[bytes]]]:
    tenant, internal = free_port(), free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "allele_rollout.gateway", "--engine", engine.url),
            *("--store", f"file://{tmp_path}/store", "--namespace", "team", "--base-name", "tiny"),
            *("--base-digest", BASE_DIGEST, "--slots", str(SLOTS), "--cache-dir", str(tmp_path / "cache")),
            *("--listen", f"127.0.0.1:{tenant}", "--internal", f"127.0.0.1:{internal}"),
            *("--settle-seconds", str(SETTLE), "--finish-seconds", "60"),
        ]
    )
    service = Service(tenant=f"http://127.0.0.1:{tenant}", internal=f"http://127.0.0.1:{internal}")
    service.wait_healthy()
    yield service, process
    process.kill()
    process.wait()


def long_stream(service: Service, chunks: list[bytes]) -> None:
    """A thousand samples of the base's whole context: some ten seconds."""
    prompts = ["kbdac="] * 1000
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 50, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{service.tenant}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            chunks.append(line)


def test_requests_end_before_the_engine_may_go(
    leaving: tuple[Service, subprocess.Popen[bytes]], engine: EngineProcess
) -> None:
    service, process = leaving
    chunks: list[bytes] = []
    ended: dict[str, float] = {}
    drained: list[Answer] = []
    left: list[int] = []

    def stream() -> None:
        try:
            long_stream(service, chunks)
        finally:
            ended["stream"] = time.monotonic()

    def engine_container() -> None:
        drained.append(call(f"{service.internal}/v1/drained"))
        left.append(engine.running())

    threads = [threading.Thread(target=t) for t in (stream, engine_container)]
    for t in threads:
        t.start()
    while not chunks:
        assert "stream" not in ended
        time.sleep(0.01)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for t in threads:
        t.join(120)
    assert chunks[-2].strip() == b"data: [DONE]" or chunks[-1].strip() == b"data: [DONE]"
    assert [a.status for a in drained] == [200]
    assert ended["stream"] > begun + SETTLE, "it was too short to be cut off"
    assert left == [0], "the engine was told to go while it had requests"
    assert process.wait(30) == 0


def test_nodes_that_have_not_heard_of_it_are_answered(leaving: tuple[Service, subprocess.Popen[bytes]]) -> None:
    service, process = leaving
    kept = http.client.HTTPConnection(service.tenant.removeprefix("http://"), timeout=60)

    def ask() -> http.client.HTTPResponse:
        body = json.dumps({"model": "tiny", "prompt": "kbdac=", "max_tokens": 2})
        kept.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = kept.getresponse()
        answer.read()
        return answer

    assert ask().headers["Connection"] != "close"
    process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 0.7 * SETTLE
    while call(f"{service.tenant}/healthz").status == 200:
        time.sleep(0.01)
    answers = [ask()]
    while time.monotonic() < end:
        answers.append(ask())
    assert {a.status for a in answers} == {200}
    assert {a.headers["Connection"] for a in answers} == {"close"}, "or the client would stay until the port closes"
    assert process.wait(30) == 0
