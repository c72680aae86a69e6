"""A population with the policy Delete goes when its folder in the store is erased, and never waits silently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from allele.store import Fact, PopulationStore
from tests.operator.conftest import StartOperator
from tests.operator.helm_chart import of_kind, render
from tests.operator.operator_harness import Obj, Team, names, until
from tests.operator.trained import claimed

FINALIZER = "allele.dev/erase"


def train(team: Team, name: str = "population") -> PopulationStore:
    """What a driver would have left of the population: a record and a commit."""
    store = claimed(team, name)
    place = store.write_segments({"g-0000": b"weights"})["g-0000"]
    store.catalogue.start("run").commit(1, [Fact.committed(member="g-0000", revision=1, weights=place, shape="s")])
    return store


def held(team: Team, name: str = "population") -> bool:
    return FINALIZER in team.get("apop", name)["metadata"].get("finalizers", [])


def delete(team: Team, *what: str, **how: str) -> None:
    flags = [f"--{k}={v}" for k, v in how.items()]
    team.cluster.run("-n", team.namespace, "delete", *what, "--wait=false", *flags)


def retain(team: Team, name: str = "population") -> None:
    patch = '{"spec": {"deletionPolicy": "Retain"}}'
    team.cluster.run("-n", team.namespace, "patch", "apop", name, "--type=merge", "-p", patch)


def gone(team: Team, name: str = "population") -> bool:
    return not team.get("apop", name)


def wait_until_gone(team: Team, name: str = "population") -> None:
    until(f"{name} is gone", lambda: gone(team, name), seconds=240, detail=lambda: team.get("apop", name))


def erase_jobs(team: Team) -> list[Obj]:
    return team.items("job", "allele.dev/role=erase")


def objects(store: PopulationStore) -> list[str]:
    return [o.path for o in store.objects.list()]


@pytest.fixture
def reached(ready_team: Team, operators: StartOperator) -> Team:
    """An operator leads, the store is reachable, and a population with the policy Delete is there."""
    operators(ready_team).wait_until_leading()
    ready_team.apply(ready_team.population(deletionPolicy="Delete"))
    ready_team.until("apop", "population", "Ready", status="True", seconds=240)
    until("the finalizer is there", lambda: held(ready_team))
    return ready_team


@pytest.mark.parametrize("cascade", ["background", "foreground", "orphan"])
def test_its_folder_is_erased_and_then_it_goes(reached: Team, cascade: str) -> None:
    team = reached
    store = train(team)
    team.apply(team.population("neighbour"))
    team.until("apop", "neighbour", "Ready", status="True")
    neighbour = train(team, "neighbour")
    before = objects(neighbour)
    delete(team, "apop/population", cascade=cascade)
    wait_until_gone(team)
    assert objects(store) == []
    assert objects(neighbour) == before

    def told() -> list[Obj]:
        return [e for e in team.items("events.events.k8s.io") if e["reason"] == "Erased"]

    (event,) = until("the event", told)
    assert f"s3://{team.bucket}/{team.namespace}/population: deleted" in event["note"]
    until("Kubernetes took the Job", lambda: not erase_jobs(team), detail=lambda: erase_jobs(team))


def test_it_waits_for_its_run_and_retain_lets_it_go(reached: Team) -> None:
    team = reached
    store = train(team)
    team.apply(team.pool(), team.rl_run(steps=10_000))
    team.until("rlrun", "run", "Running", status="True", seconds=240)
    delete(team, "apop/population")
    team.until("apop", "population", "Erased", status="False", reason="RunsActive", words="RLRun run")
    team.until("apop", "population", "Ready", status="False", reason="RunsActive")
    assert not erase_jobs(team)
    retain(team)
    wait_until_gone(team)
    assert store.record() is not None

    team.apply(team.population(deletionPolicy="Delete", adopt=True))
    until("the finalizer is there", lambda: held(team))
    delete(team, "apop/population")
    team.until("apop", "population", "Erased", status="False", reason="RunsActive")
    delete(team, "rlrun/run")
    wait_until_gone(team)
    assert store.record() is not None, "it never came to adopt the folder, which belongs to the first one"


def test_a_missing_store_and_wrong_credentials_are_told_and_the_job_comes_when_they_are_right(
    reached: Team, s3: Any
) -> None:
    team = reached
    store = train(team)
    delete(team, "ast/store")
    delete(team, "apop/population")
    team.until(
        "apop", "population", "Erased", status="False", reason="StoreMissing", words="spec.deletionPolicy Retain"
    )
    team.apply(team.store())
    team.until("ast", "store", "Reachable", status="True", seconds=240)
    wait_until_gone(team)
    assert objects(store) == []


def test_a_job_that_fails_is_told_and_made_again(reached: Team) -> None:
    team = reached
    store = train(team)
    record = store.objects.get("population.json")
    store.objects.put("population.json", b"damaged")
    delete(team, "apop/population")
    team.until("apop", "population", "Erased", status="False", reason="OwnershipError", words="expected", seconds=240)
    (first,) = (j["metadata"]["uid"] for j in erase_jobs(team))
    store.objects.put("population.json", record)
    wait_until_gone(team)
    assert objects(store) == []
    assert first not in {j["metadata"]["uid"] for j in erase_jobs(team)}


@pytest.fixture
def confined(ready_team: Team, elsewhere: str, helm: str, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Flags for an operator with the rights that the chart gives for one namespace, and no others."""
    team, out = ready_team, render(helm, f"scope.namespaces={{{ready_team.namespace}}}", namespace=elsewhere)
    wide = of_kind(out, "ClusterRole", "ClusterRoleBinding")
    team.apply(*of_kind(out, "Role", "RoleBinding", "ServiceAccount"), *wide)
    access = yaml.safe_load(team.cluster.kubeconfig.read_text())
    token = team.cluster.run("-n", elsewhere, "create", "token", "allele-operator", "--duration=1h").strip()
    access["users"] = [{"name": access["users"][0]["name"], "user": {"token": token}}]
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(access))
    yield "--kubeconfig", str(path), "--lease-namespace", elsewhere
    for obj in wide:
        team.cluster.run("delete", obj["kind"], obj["metadata"]["name"])


def test_the_rights_that_the_chart_gives_for_a_namespace_suffice(
    ready_team: Team, operators: StartOperator, confined: tuple[str, ...]
) -> None:
    team = ready_team
    operator = operators(team, lease="allele-operator", flags=confined).wait_until_leading()
    team.apply(team.population(deletionPolicy="Delete", retention={"schedule": "0 0 29 2 *"}))
    team.until("apop", "population", "Collected", status="Unknown", reason="Scheduled", seconds=240)
    team.until("apop", "population", "Ready", status="True", seconds=240)
    store = train(team)
    delete(team, "apop/population")
    wait_until_gone(team)
    assert objects(store) == []
    assert not operator.lines("Forbidden"), operator.tail()


@pytest.fixture
def elsewhere(team: Team) -> Iterator[str]:
    """A namespace for the operator's lease that outlives the team's."""
    name = f"{team.namespace}-system"
    team.cluster.run("create", "namespace", name)
    yield name
    team.cluster.run("delete", "namespace", name, "--wait=false")


def test_a_namespace_that_is_deleted_goes_and_an_event_beside_the_operator_says_what_stays(
    ready_team: Team, operators: StartOperator, elsewhere: str
) -> None:
    team = ready_team
    operator = operators(team, flags=("--lease-namespace", elsewhere)).wait_until_leading()
    team.apply(team.population(deletionPolicy="Delete"))
    team.until("apop", "population", "Ready", status="True", seconds=240)
    until("the finalizer is there", lambda: held(team))
    store = train(team)
    team.cluster.run("delete", "namespace", team.namespace, "--wait=false")
    find = ("get", "namespace", team.namespace, "--ignore-not-found", "-o", "name")
    until("the namespace is gone", lambda: not team.cluster.run(*find), seconds=240, detail=operator.tail)
    assert store.record() is not None

    def told() -> list[Obj]:
        events = json.loads(team.cluster.run("-n", elsewhere, "get", "events.events.k8s.io", "-o", "json"))["items"]
        return [e for e in events if e["reason"] == "NamespaceTerminating"]

    (event,) = until("the event", told)
    assert event["type"] == "Warning" and event["regarding"]["kind"] == "Lease"
    assert f"s3://{team.bucket}/{team.namespace}/population: the bytes stay" in event["note"]
    assert f"allele populations --namespace {team.namespace} --store s3://{team.bucket}" in event["note"]
    assert list(names(team.items("apop"))) == []
