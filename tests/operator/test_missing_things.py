"""What is missing is named in a condition, and a run proceeds by itself as each thing appears."""

from __future__ import annotations

from typing import Any

from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import Team, names, until


def test_a_run_names_what_it_lacks_and_proceeds_when_it_comes(team: Team, s3: Any, operators: StartOperator) -> None:
    operator = operators(team).wait_until_leading()

    team.apply(team.rl_run(steps=5))
    team.until("rlrun", "run", "Admitted", status="False", reason="PopulationMissing", words='"population" not found')
    team.apply(team.population())
    team.until("rlrun", "run", "Admitted", status="False", reason="PoolMissing", words='"pool" not found')
    team.until("apop", "population", "Ready", status="False", reason="StoreMissing", words='"store" not found')

    team.apply(team.pool())
    team.until("bp", "pool", "Ready", status="False", reason="RuntimeMissing", words='"runtime" not found')
    team.apply(*team.standins(), team.runtime())
    team.until("bp", "pool", "Ready", status="False", reason="StoreMissing", words='"store" not found')

    team.apply(team.store())
    team.until("ast", "store", "Reachable", status="False", reason="SecretMissing", words='"s3" not found')
    assert not team.items("jobset"), "no pods for a store that nobody reached"
    team.apply(team.secret())
    team.until("ast", "store", "Reachable", status="False", reason="BucketMissing", words=team.bucket, seconds=240)
    team.until("bp", "pool", "Ready", status="False", reason="StoreUnreachable", words="BucketMissing")

    s3.create_bucket(Bucket=team.bucket)
    team.until("ast", "store", "Reachable", status="True", seconds=240)
    assert set(team.get("ast", "store")["status"]["capabilities"]) >= {"CreateOnly", "IfMatch", "RangedRead"}
    team.until("bp", "pool", "Ready", status="True", seconds=240)
    assert sorted(names(team.items("service", "allele.dev/role=service"))) == ["pool", "pool-rollout", "pool-trainer"]
    team.until("rlrun", "run", "Succeeded", status="True", seconds=240)
    run = team.get("rlrun", "run")
    assert run["status"]["progress"] == {"step": 5, "steps": 5, "percentage": 100}
    until("the members are given back", lambda: not team.get("rlrun", "run")["metadata"].get("finalizers"))
    # Numbers that follow reports are written once per interval; the run's own were written before.
    until(
        "the population counts its members as trained",
        lambda: team.get("apop", "population")["status"]["members"]["trained"] == 4,
    )
    assert not operator.dead


def test_a_child_that_somebody_deletes_is_made_again(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operators(team).wait_until_leading()
    team.apply(team.pool())
    team.until("bp", "pool", "Ready", status="True", seconds=240)
    for kind in ("service", "jobset"):
        name, uid = next((o["metadata"]["name"], o["metadata"]["uid"]) for o in team.items(kind, "allele.dev/role"))
        team.cluster.run("-n", team.namespace, "delete", kind, name, "--wait=false")
        until(f"another {kind}", lambda k=kind, n=name, u=uid: fresh(team, k, n, u))
    team.until("bp", "pool", "Ready", status="True", seconds=240)


def test_what_the_api_server_refuses_is_told_and_tried_again(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operators(team).wait_until_leading()
    team.until("ast", "store", "Reachable", status="True", seconds=240)
    head = {"name": "none", "namespace": team.namespace}
    hard = {"count/jobsets.jobset.x-k8s.io": "0"}
    team.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": head, "spec": {"hard": hard}})
    until("the quota counts", lambda: team.get("resourcequota", "none").get("status", {}).get("hard"))
    team.apply(team.pool())

    def told() -> bool:
        events = team.items("events.events.k8s.io")
        return any(e["reason"] == "Refused" and "exceeded quota: none" in e["note"] for e in events)

    until("an event that names the quota", told)
    team.until("bp", "pool", "Ready", status="False", reason="Starting")
    team.cluster.run("-n", team.namespace, "delete", "resourcequota", "none")
    team.until("bp", "pool", "Ready", status="True", seconds=240)


def fresh(team: Team, kind: str, name: str, uid: str) -> bool:
    return team.get(kind, name).get("metadata", {}).get("uid", uid) != uid


def test_deleting_leaves_nothing(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operators(team).wait_until_leading()
    team.apply(team.pool(), team.population(), team.rl_run(steps=10_000))
    team.until("rlrun", "run", "Running", status="True", seconds=240)
    team.cluster.run("-n", team.namespace, "delete", "rlrun/run", "bp/pool", "ast/store", "--wait=false")

    def left() -> list[str]:
        kinds = ("rlrun", "bp", "ast", "jobset", "job", "pod", "service", "configmap")
        found = (f"{k}/{n}" for k in kinds for n in names(team.items(k)))
        return [x for x in found if x != "configmap/kube-root-ca.crt"]

    until("nothing is left", lambda: not left(), seconds=240, detail=left)
