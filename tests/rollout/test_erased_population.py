"""A population that is erased and made again under its name is not served from what was known of the first one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from pathlib import Path

import pytest

from allele.protocol.errors import NotFound
from allele.store import Objects
from allele.store.erase import erase
from allele_rollout.gateway.populations import Populations
from tests.rollout.rollout_parts import BASE_DIGEST, StoredPopulation, random_adapter


async def seen(populations: Populations, member: str) -> list[str]:
    """Digests under the bare name; [] where there is nothing."""
    with contextlib.suppress(NotFound):
        found = await (await populations.get("team", "styles")).exposed(member)
        return [a.weights.digest for a in found]
    return []


def digest(seed: int) -> str:
    return hashlib.sha256(random_adapter(seed)).hexdigest()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


async def test_the_second_population_of_a_name_is_served(url: str) -> None:
    first = StoredPopulation(url, namespace="team", name="styles")
    for revision in range(1, 8):
        first.commit({"a": random_adapter(revision)}, revision=revision, expose=True)
    populations = Populations(
        Objects.open(url), base_name="tiny", base_digest=BASE_DIGEST, forget_absent=0.0, clock=time.monotonic
    )
    assert await seen(populations, "a") == [digest(7), digest(6)]
    tail = asyncio.create_task(populations.tail(interval=0.01, on_failure=lambda: None))
    try:
        assert erase(first.store, uid="uid-1").outcome == "Erased"
        second = StoredPopulation(url, namespace="team", name="styles", uid="uid-2")
        second.commit({"a": random_adapter(100)}, expose=True)
        async with asyncio.timeout(30):
            while await seen(populations, "a") != [digest(100)]:
                await asyncio.sleep(0.01)
        assert erase(second.store, uid="uid-2").outcome == "Erased"
        async with asyncio.timeout(30):
            while await seen(populations, "a"):
                await asyncio.sleep(0.01)
    finally:
        tail.cancel()
