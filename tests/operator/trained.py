"""What a driver leaves of a population in the bucket, without one."""

from __future__ import annotations

from allele.store import PopulationRecord, PopulationStore
from tests.operator.operator_harness import BASE_DIGEST, Team


def folder(team: Team, population: str) -> PopulationStore:
    """The population's, opened from here."""
    url, environ = f"s3://{team.bucket}", team.cluster.environ
    return PopulationStore.open(url, namespace=team.namespace, population=population, environ=environ)


def claimed(team: Team, population: str) -> PopulationStore:
    """The folder of a population that is there, with its record."""
    store, uid = folder(team, population), team.get("apop", population)["metadata"]["uid"]
    store.claim(PopulationRecord(uid=uid, base_digest=BASE_DIGEST, shapes={"g": "s"}))
    return store
