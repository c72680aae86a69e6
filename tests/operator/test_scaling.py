"""A pool is scaled as a Deployment is, and only ready gateways get requests."""

from __future__ import annotations

import json

from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import API, Team, names, until
from tests.operator.test_gateway_reports import rollouts


def serving_pool(team: Team) -> dict[str, object]:
    pool = team.pool()
    del pool["spec"]["trainer"]
    return pool


def endpoints(team: Team, service: str) -> set[str]:
    """Pods that the Service sends requests to."""
    found = set()
    for part in team.items("endpointslices.discovery.k8s.io", f"kubernetes.io/service-name={service}"):
        for e in part["endpoints"] or ():
            if e["conditions"].get("ready"):
                found.add(e["targetRef"]["name"])
    return found


def test_a_serving_pool_follows_kubectl_scale(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operators(team).wait_until_leading()
    team.apply(serving_pool(team))
    (first,) = rollouts(team, n=1)
    team.until("bp", "pool", "Ready", status="True", seconds=60)
    assert not team.items("pod", "allele.dev/role=trainer")
    assert team.get("service", "pool-trainer") == {}
    team.cluster.run("-n", team.namespace, "scale", "bp", "pool", "--replicas=3")
    three = rollouts(team, n=3)
    assert first in three, "the one that serves stays"
    until("all get requests", lambda: endpoints(team, "pool") == set(three))
    team.cluster.run("-n", team.namespace, "scale", "bp", "pool", "--replicas=1")
    assert rollouts(team, n=1) == [first]
    until("one gets requests", lambda: endpoints(team, "pool") == endpoints(team, "pool-rollout") == {first})


def test_a_gateway_that_is_not_ready_gets_no_requests(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operators(team).wait_until_leading()
    team.apply(serving_pool(team))
    (pod,) = rollouts(team, n=1)
    until("it gets requests", lambda: endpoints(team, "pool") == {pod})
    team.cluster.run("-n", team.namespace, "exec", pod, "-c", "gateway", "--", "touch", "/tmp/unready")
    until("it gets none", lambda: not endpoints(team, "pool"), seconds=60)
    team.until("bp", "pool", "Ready", status="False", seconds=60)
    team.cluster.run("-n", team.namespace, "exec", pod, "-c", "gateway", "--", "rm", "/tmp/unready")
    until("it gets them again", lambda: endpoints(team, "pool") == {pod}, seconds=60)


def test_an_autoscaler_can_read_and_write_the_scale(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operators(team).wait_until_leading()
    team.apply(serving_pool(team))
    pods = set(rollouts(team, n=1))
    team.until("bp", "pool", "Ready", status="True", seconds=60)
    path = f"/apis/{API}/namespaces/{team.namespace}/basepools/pool/scale"
    scale = json.loads(team.cluster.run("get", "--raw", path))
    assert scale["spec"]["replicas"] == scale["status"]["replicas"] == 1
    assert set(names(team.items("pod", scale["status"]["selector"]))) == pods, "it measures these pods"

    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}},
    }
    target = {"apiVersion": API, "kind": "BasePool", "name": "pool"}
    spec = {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 3, "metrics": [metric]}
    head = {"name": "pool", "namespace": team.namespace}
    team.apply({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": head, "spec": spec})
    team.until("hpa", "pool", "AbleToScale", status="True", seconds=90)
    rollouts(team, n=2)
