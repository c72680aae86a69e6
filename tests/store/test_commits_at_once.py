"""Runs that commit to one population at the same time lose nothing, over every kind of store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from allele.store import Fact, PopulationStore
from tests.store.crash import check_bytes

pytestmark = pytest.mark.everywhere

RUNS = 4
STEPS = 10


def publish(store: PopulationStore, run: str) -> None:
    """A segment and a commit for each step, as fast as it goes."""
    writer = store.catalogue.start(run)
    for step in range(1, STEPS + 1):
        written = store.write_segments({f"{run}-{i}": f"{run} {step} {i}".encode() for i in range(2)})
        facts = [Fact.committed(member=m, revision=step, weights=where, shape="s") for m, where in written.items()]
        writer.commit(step, facts)


def test_a_burst_of_commits_loses_none(store_url: str) -> None:
    runs = [f"run-{i}" for i in range(RUNS)]
    stores = [PopulationStore.open(store_url, namespace="team", population="users") for _ in runs]
    stores[0].catalogue.start("earlier")  # so that the table is there
    with ThreadPoolExecutor(RUNS) as pool:
        list(pool.map(publish, stores, runs))
    reader = PopulationStore.open(store_url, namespace="team", population="users")
    found = sorted((f.run, f.member, f.revision) for f in reader.catalogue.facts() if f.kind == "Committed")
    assert found == sorted((r, f"{r}-{i}", step) for r in runs for i in range(2) for step in range(1, STEPS + 1))
    check_bytes(reader)
