"""One engine, gateway and trainer for all tests of a driver; each test has a population of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.driver.driver_parts import (
    BASE,
    DIGEST,
    EXAMPLE,
    NAMESPACE,
    TARGETS,
    DrivenRun,
    Pool,
    Process,
    bundle,
    free_port,
    wait_until,
)

SLOTS = 4


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real SGLang server; ALLELE_TEST_ENGINE names one that runs already, for working on these tests."""
    if running := os.environ.get("ALLELE_TEST_ENGINE"):
        yield running
        return
    port = str(free_port())
    process = Process(
        "allele_rollout.engine",
        *("--base", str(BASE), "--port", port, "--slots", str(SLOTS + 1), "--max-rank", "8", "--targets", TARGETS),
        log=tmp_path_factory.mktemp("engine") / "log",
    )
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.healthy(f"{url}/model_info"), seconds=550, what="engine")
        yield url
    finally:
        process.kill()


@pytest.fixture(scope="session")
def pool(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("pool")
    store = f"file://{folder}/store"
    tenant, internal, trainer_port = free_port(), free_port(), free_port()
    faults = folder / "faults.json"
    faults.write_text("{}")
    gateway = Process(
        "tests.driver.faulty_gateway",
        str(faults),
        *("--engine", engine, "--store", store, "--namespace", NAMESPACE, "--base-name", "tiny"),
        *("--base-digest", DIGEST, "--slots", str(SLOTS), "--cache-dir", str(folder / "cache")),
        *("--listen", f"127.0.0.1:{tenant}", "--internal", f"127.0.0.1:{internal}"),
        *("--peer", f"http://127.0.0.1:{trainer_port}"),
        log=folder / "gateway.log",
    )
    trainer = Process(
        "allele_trainer",
        *("--base", str(BASE), "--base-digest", DIGEST, "--store", store, "--slots", str(SLOTS), "--max-rank", "8"),
        *("--listen", f"127.0.0.1:{trainer_port}"),
        log=folder / "trainer.log",
    )
    found = Pool(
        store=store,
        trainer=trainer,
        trainer_url=f"http://127.0.0.1:{trainer_port}",
        gateway_url=f"http://127.0.0.1:{internal}",
        tenant_url=f"http://127.0.0.1:{tenant}",
        faults=faults,
    )
    try:
        gateway.start()
        found.start_trainer()
        wait_until(lambda: gateway.healthy(f"http://127.0.0.1:{tenant}/healthz"), seconds=200, what="gateway")
        yield found
    finally:
        trainer.kill()
        gateway.kill()


@pytest.fixture
def run(pool: Pool, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., DrivenRun]]:
    """Makes runs of the example; nothing is started yet."""
    made: list[DrivenRun] = []

    def make(name: str, *, members: int = 3, steps: int = 6, code: Path = EXAMPLE, **spec: Any) -> DrivenRun:
        given = bundle(name, uid=f"uid-of-run-{name}-{len(made)}", members=members, steps=steps, **spec)
        made.append(DrivenRun(pool, tmp_path / f"run-{len(made)}", given, code=code))
        return made[-1]

    yield make
    for r in made:
        r.close()
