"""What a run announces is loaded before it is sampled, stays until it has been, and never takes the room of others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import pytest

from allele.protocol.serving import Prefetch, Prefetched, Target
from allele.residency.space import pages
from tests.rollout.rollout_engine import SLOTS
from tests.rollout.rollout_parts import SHAPE, Service, StoredPopulation, call, random_adapter

Start = Callable[..., Service]
OTHERS = [f"o{i}" for i in range(7)]


@pytest.fixture
def service(gateway: Start) -> Service:
    """A tier of six adapters, however they are published: room for three of them ahead."""
    return gateway(loaded=6, host_bytes=6 * pages(SHAPE.packed_bytes))


@pytest.fixture
def version(population: StoredPopulation) -> int:
    return population.commit({m: random_adapter(i) for i, m in enumerate(["a", "b", "c", "d", *OTHERS])})


def announce(service: Service, version: int, members: Sequence[str], *, run: str = "run", seconds: float = 300) -> int:
    body = Prefetch(
        namespace="team",
        population="styles",
        run=run,
        version=version,
        targets=tuple(Target(member=m, revision=1) for m in members),
        seconds=seconds,
    )
    answer = call(f"{service.internal}/v1/prefetch", body.model_dump_json().encode())
    assert answer.status == 200, answer.body
    return Prefetched.model_validate_json(answer.body).taken


def loads(service: Service) -> int:
    found = re.search(rb'residency_events_total\{event="loaded"\} (\d+)', call(f"{service.internal}/metrics").body)
    return int(found[1]) if found else 0


def loaded(service: Service, n: int) -> None:
    deadline = time.monotonic() + 60
    while loads(service) < n:
        assert time.monotonic() < deadline, f"expected {n} loads, found {loads(service)}"
        time.sleep(0.05)


def sample(service: Service, version: int, members: Sequence[str]) -> None:
    for m in members:
        (found,) = service.generate([(m, 1, (3, 2))], version=version, max_tokens=1)
        assert found.error is None


def test_it_is_loaded_when_it_is_sampled_whatever_else_was(service: Service, version: int) -> None:
    assert announce(service, version, ["a", "b"]) == 2
    loaded(service, 2)
    sample(service, version, [*OTHERS, *OTHERS])  # used more often than those, so they would have to go
    before = loads(service)
    sample(service, version, ["a", "b"])
    assert loads(service) == before


@pytest.mark.parametrize("how", ["replaced", "lease"])
def test_it_is_let_go_by_the_next_announcement_or_with_its_lease(service: Service, version: int, how: str) -> None:
    announce(service, version, ["a", "b"], seconds=300 if how == "replaced" else 1)
    loaded(service, 2)
    if how == "replaced":
        assert announce(service, version, []) == 0
    else:
        time.sleep(1.5)  # the lease itself
    sample(service, version, [*OTHERS, *OTHERS])
    before = loads(service)
    sample(service, version, ["a"])
    assert loads(service) == before + 1, "it was still kept"


def test_runs_share_half_of_the_tier_and_what_is_not_there_takes_none(service: Service, version: int) -> None:
    assert announce(service, version, ["ghost", "a", "b"]) == 2
    assert announce(service, version, ["c", "d"], run="other") == 1
    assert announce(service, version, ["d"], run="third") == 0
    assert announce(service, version, [], run="other") == 0
    assert announce(service, version, ["d"], run="third") == 1
    rows = [(m, 1, (3, 2)) for m in OTHERS[:SLOTS]]
    assert not any(s.error for s in service.generate(rows, version=version, max_tokens=1))


def test_a_body_that_is_none_is_refused(service: Service) -> None:
    answer = call(f"{service.internal}/v1/prefetch", {"targets": 3})
    assert answer.status == 422 and "expected a Prefetch" in answer.json["message"]
