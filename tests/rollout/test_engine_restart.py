"""An engine that dies takes all its adapters along; the gateway says so, puts them in again and repeats what it may."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import Answer, Service, StoredPopulation, call, random_adapter

PROMPT = (13, 4, 6, 3, 5, 2)
LONG = {"max_tokens": 50, "ignore_eos": True}


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path / "log")
    process.start()
    process.wait()
    yield process
    process.kill()


def resident(service: Service) -> int:
    return {t["name"]: t["adapters"] for t in call(f"{service.internal}/v1/status").json["tiers"]}["host"]


def until(condition: Callable[[], Any], what: str, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def stream(service: Service, model: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urllib.parse.urlparse(service.tenant).netloc, timeout=300)
    body = json.dumps({"model": model, "prompt": "kbdac=", "temperature": 0, "stream": True, **LONG})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def test_a_request_outlives_the_engine_that_it_was_sent_to(
    gateway: Callable[..., Service], population: StoredPopulation, mortal: EngineProcess
) -> None:
    population.commit({f"m{i}": random_adapter(i) for i in range(6)}, expose=True)
    service = gateway(engine=mortal.url)
    rows = [(f"m{i}", 1, PROMPT) for i in range(6)]
    before = service.generate(rows, temperature=0.0)
    alone = service.generate(rows[1:2], temperature=0.0)
    truth = service.complete("styles/m1", n=16, **LONG).json
    assert resident(service) == 6

    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(service.complete("styles/m1", n=16, **LONG)))
    connection, streaming = stream(service, "styles/m2")
    assert streaming.status == 200 and streaming.readline().startswith(b"data: ")
    asking.start()
    mortal.until_running(lambda n: n >= 16)
    mortal.kill()
    with pytest.raises((http.client.HTTPException, OSError)):
        while line := streaming.readline():
            assert line != b"data: [DONE]\n", "the stream ended as if it were whole"
        raise http.client.IncompleteRead(b"")
    connection.close()
    until(lambda: not service.healthy(), "the gateway sees that the engine is gone")
    assert call(f"{service.internal}/healthz").status == 503
    assert call(f"{service.internal}/v1/status").json["engine"] == "Failed"
    late = service.complete("styles/a")
    assert late.status == 503 and late.json["error"]["code"] == "Unavailable" and late.headers["Retry-After"]

    mortal.start()
    mortal.wait()
    service.wait_healthy()
    assert resident(service) == 6, "what was resident is put in again, not forgotten"
    asking.join(120)
    assert [a.status for a in answers] == [200]
    assert answers[0].json["choices"] == truth["choices"]
    after = service.generate(rows, temperature=0.0)
    assert [s.completion for s in after] == [s.completion for s in before]
    # The company in a batch shows in the last bits, so numbers are compared of one that has none.
    (again,) = service.generate(rows[1:2], temperature=0.0)
    assert again.completion == alone[0].completion
    assert again.logprobs == pytest.approx(alone[0].logprobs, abs=1e-6)
