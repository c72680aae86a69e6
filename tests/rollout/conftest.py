"""One real engine for the session, and for each test a store with a population and a gateway in front of both."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allele_rollout.gateway.__main__ import serve
from allele_rollout.gateway.settings import GatewaySettings
from tests.rollout.rollout_engine import SLOTS, EngineProcess, free_port
from tests.rollout.rollout_parts import BASE_DIGEST, Service, StoredPopulation


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """ALLELE_TEST_ENGINE: URL of one that runs already, for working on these tests."""
    process = EngineProcess(tmp_path_factory.mktemp("engine") / "log")
    if running := os.environ.get("ALLELE_TEST_ENGINE"):
        process.url = running
        yield process
        return
    process.start()
    process.wait()
    yield process
    process.kill()


@pytest.fixture
def population(tmp_path: Path) -> StoredPopulation:
    return StoredPopulation(f"file://{tmp_path}/store", namespace="team", name="styles")


@pytest.fixture
def gateway(engine: EngineProcess, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts gateways, by default with the test's store."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread]] = []

    def start(**changes: object) -> Service:
        ports = free_port(), free_port()
        settings = GatewaySettings(
            **{  # type: ignore[arg-type]
                "engine": engine.url,
                "store": f"file://{tmp_path}/store",
                "namespace": "team",
                "base_name": "tiny",
                "base_digest": BASE_DIGEST,
                "cache_dir": str(tmp_path / "cache"),
                "host_dir": str(tmp_path / "shm"),
                "host_bytes": 64 << 20,
                "slots": SLOTS,
                "listen": f"127.0.0.1:{ports[0]}",
                "internal": f"127.0.0.1:{ports[1]}",
                "tail_seconds": 0.2,
                **changes,
            }
        )
        loop, stop = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=loop.run_until_complete, args=(serve(settings, stop),))
        thread.start()
        running.append((loop, stop, thread))
        service = Service(tenant=f"http://127.0.0.1:{ports[0]}", internal=f"http://127.0.0.1:{ports[1]}")
        service.wait_healthy()
        return service

    yield start
    for loop, stop, thread in running:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive(), "the gateway did not stop"
