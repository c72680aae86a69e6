"""A pool is scaled up and down while clients go on asking: none of them is told no."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import Demo

pytestmark = pytest.mark.timeout(1800)
Kubectl = Callable[..., str]


class Clients:
    """Ask one after the other: some with a connection for each request, some with one for twenty of them."""

    def __init__(self, url: str, model: str) -> None:
        self._host = urlsplit(url).hostname or ""
        self._body = json.dumps({"model": model, "prompt": "kbdac=", "max_tokens": 8})
        self._stop = threading.Event()
        self.answered = 0
        self.failures: list[str] = []

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask, kwargs={"keep": i % 2 == 0}) for i in range(4)]
        for t in threads:
            t.start()
        try:
            yield
        finally:
            self._stop.set()
            for t in threads:
                t.join()

    def _ask(self, *, keep: bool) -> None:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        for n in itertools.count(1):
            if self._stop.is_set():
                return
            try:
                connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException) as e:
                self.failures.append(f"{type(e).__name__}: {e}")
                connection.close()
                continue
            if answer.status == 200:
                self.answered += 1
            else:
                self.failures.append(f"{answer.status}: {data[:200]!r}")
            if not keep or n % 20 == 0:  # over the next connection another replica may answer
                connection.close()


def pods(kubectl: Kubectl, pool: str) -> list[dict[str, Any]]:
    selector = f"allele.dev/pool={pool},allele.dev/role=rollout"
    return list(json.loads(kubectl("get", "pods", "--selector", selector, "--output", "json"))["items"])


def scale(kubectl: Kubectl, pool: str, replicas: int) -> None:
    """Returns when exactly so many are there, and ready."""
    kubectl("scale", "bp", pool, f"--replicas={replicas}")

    def ready(pod: dict[str, Any]) -> bool:
        return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))

    end = time.monotonic() + 900
    while not (len(found := pods(kubectl, pool)) == replicas and all(map(ready, found))):
        assert time.monotonic() < end, f"expected {replicas} ready rollouts, found {[p['status'] for p in found]}"
        time.sleep(1)


def check_scaling(kubectl: Kubectl, pool: str, model: str) -> None:
    """One replica → two → one; the pool has one."""
    service = json.loads(kubectl("get", "service", pool, "--output", "json"))
    clients = Clients(f"http://{service['spec']['clusterIP']}", model)
    with clients.asking():
        for replicas in (2, 1):
            scale(kubectl, pool, replicas)
            before = clients.answered
            while clients.answered < before + 50 and not clients.failures:
                time.sleep(0.2)
    assert not clients.failures
    assert clients.answered > 100


def test_no_request_fails_while_a_pool_is_scaled(cluster_demo: Demo, kubectl: Kubectl) -> None:
    check_scaling(kubectl, "tiny", "preferences/taste-0003")
