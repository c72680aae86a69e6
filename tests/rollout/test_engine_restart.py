"""An engine that dies takes all its adapters along; the gateway says so, and serves again when it is back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import Service, StoredPopulation, call, random_adapter

PROMPT = (13, 4, 6, 3, 5, 2)


def test_adapters_are_loaded_again_after_the_engine_was_killed(
    gateway: Callable[..., Service], population: StoredPopulation, engine: EngineProcess
) -> None:
    population.commit({"a": random_adapter(1)}, expose=True)
    service = gateway()
    before = service.generate([("a", 1, PROMPT)], temperature=0.0)
    engine.kill()
    answer = service.complete("styles/a")
    assert answer.status == 503 and answer.json["error"]["code"] == "Unavailable"
    assert call(f"{service.tenant}/healthz").status == 503
    assert call(f"{service.internal}/healthz").status == 503
    assert call(f"{service.internal}/v1/status").json["engine"] == "Failed"
    engine.start()
    engine.wait()
    service.wait_healthy()
    assert {t["name"]: t["adapters"] for t in call(f"{service.internal}/v1/status").json["tiers"]}["host"] == 0
    after = service.generate([("a", 1, PROMPT)], temperature=0.0)
    assert after[0].completion == before[0].completion
    assert after[0].logprobs == pytest.approx(before[0].logprobs, abs=1e-6)
    assert service.complete("styles/a").status == 200
