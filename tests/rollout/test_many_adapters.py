"""256 adapters over four slots: every answer is the one of its member and revision, whatever happens meanwhile."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allele.residency.space import pages
from tests.rollout.churn import Churn
from tests.rollout.rollout_parts import SHAPE, Service, StoredPopulation, call
from tests.store.conftest import enter
from tests.store.proxy import Proxy, Rule
from tests.store.servers import BUCKET, serve

MEMBERS = 256
HOST = 48
"""Adapters that fit in host memory."""
DISK = 128
"""And on disk: the others come from the store."""
OUTAGE = 60.0
"""Seconds without a store."""


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with serve(tmp_path) as server, Proxy.start(server.environ) as started:
        enter(started.environ, monkeypatch)
        yield started


def events(service: Service) -> dict[str, float]:
    text = call(f"{service.internal}/metrics").body.decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("allele_gateway_"))
    return {name.removeprefix("allele_gateway_"): float(value) for name, value in lines}


def pause(seconds: float, churn: Churn) -> int:
    """Answers that came meanwhile."""
    before = churn.answers
    time.sleep(seconds)
    print(f"{seconds:g} s: {churn.answers - before} answers, {dict(churn.outcomes)}")
    return churn.answers - before


def test_every_answer_is_right_while_revisions_change_and_without_the_store(
    gateway: Callable[..., Service], proxy: Proxy
) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    size = SHAPE.packed_bytes
    service = gateway(store=url, host_bytes=HOST * pages(size), cache_bytes=DISK * size)
    population = StoredPopulation(url, namespace="team", name="styles")
    churn = Churn(service, population, members=MEMBERS, seed=1)
    churn.start(clients=12, publish_every=1.0, publish=32)
    assert pause(30, churn) > 100
    with churn.without_store(), proxy.rule(Rule(action="answer", times=0, status=503)):
        assert pause(OUTAGE, churn) > 100, "what is resident is served without the store"
    assert pause(10, churn) > 50
    churn.stop()
    wrong = churn.check()
    assert not wrong, f"{len(wrong)} of {churn.answers}: {wrong[:5]}"
    assert not churn.outcomes["no answer"], churn.outcomes
    counted = events(service)
    assert counted['residency_events_total{event="evicted"}'] > HOST, "nothing was unloaded under fire"
    assert counted['reads_total{place="store"}'] > MEMBERS
    assert counted['reads_total{place="disk"}'] > 0
    tiers = {t["name"]: t for t in call(f"{service.internal}/v1/status").json["tiers"]}
    assert tiers["host"]["bytes"] <= HOST * pages(size) and tiers["disk"]["bytes"] <= DISK * size
