"""A pool's status is what its gateways say with their pods' own tokens, of the replicas that are there."""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import OperatorProcess, Team, names, until


def post(operator: OperatorProcess, bearer: str, report: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        operator.url("/v1/gateways"), json.dumps(report).encode(), {"Authorization": f"Bearer {bearer}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def report(team: Team, replica: str, *, pool: str = "pool", hot: int = 2, native: str = "") -> dict[str, Any]:
    status = {
        "replica": replica,
        "engine": "Ready",
        "engine_version": "1",
        "publish_path": "Native" if native else "Bulk",
        "publish_path_message": native,
        "base_digest": "sha256:0",
        "tiers": [{"name": "hot", "adapters": hot, "bytes": 100 * hot, "capacity": 4}],
        "populations": {},
    }
    return {"namespace": team.namespace, "pool": pool, "status": status}


def rollouts(team: Team, pool: str = "pool", *, n: int = 2) -> list[str]:
    selector = f"allele.dev/pool={pool},allele.dev/role=rollout"

    def is_ready(pod: dict[str, Any]) -> bool:  # one that has just been made has no conditions
        return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))

    def ready() -> list[str]:
        pods = team.items("pod", selector)
        up = [p for p in pods if is_ready(p)]
        return sorted(names(up)) if len(up) == len(pods) == n else []

    return list(until(f"{n} rollouts of {pool}", ready, seconds=240))


def mounted_token(team: Team, pod: str) -> str:
    """As kubelet projected it into the gateway's container."""
    return team.cluster.run(
        *("-n", team.namespace, "exec", pod, "-c", "gateway", "--", "cat", "/allele/token/token")
    ).strip()


def bound_token(team: Team, pod: str) -> str:
    arguments = ["create", "token", "default", "--audience", "allele-operator", "--bound-object-kind", "Pod"]
    return team.cluster.run("-n", team.namespace, *arguments, "--bound-object-name", pod).strip()


@pytest.fixture
def serving(ready_team: Team, operators: StartOperator) -> tuple[Team, OperatorProcess, dict[str, str]]:
    """A pool of two replicas with the tokens of their gateways."""
    operator = operators(ready_team).wait_until_leading()
    ready_team.apply(ready_team.pool(rollout={"replicas": 2, "slots": 4}))
    return ready_team, operator, {pod: mounted_token(ready_team, pod) for pod in rollouts(ready_team)}


def test_only_the_pools_own_gateways_are_believed(serving: tuple[Team, OperatorProcess, dict[str, str]]) -> None:
    team, operator, tokens = serving
    pod, mine = next(iter(tokens.items()))
    told = report(team, pod)
    assert post(operator, "garbage", told)[0] == 401
    trainer = next(names(team.items("pod", "allele.dev/role=trainer")))
    code, answer = post(operator, bound_token(team, trainer), told)
    assert (code, answer["code"]) == (403, "Forbidden"), answer
    team.apply(team.pool("other", trainer={"slots": 4}))
    (foreign,) = rollouts(team, "other", n=1)
    code, answer = post(operator, mounted_token(team, foreign), told)
    assert code == 403 and "not a rollout of pool 'pool'" in answer["message"]
    code, answer = post(operator, mine, told | {"status": told["status"] | {"engine": "Odd"}})
    assert code == 422 and "status.engine" in answer["message"]
    assert "tiers" not in team.get("bp", "pool")["status"]
    assert post(operator, mine, told) == (200, {"accepted": True})
    until("its numbers in the status", lambda: team.get("bp", "pool")["status"].get("tiers"))


def test_the_status_sums_replicas_and_forgets_those_that_go_or_fall_silent(
    serving: tuple[Team, OperatorProcess, dict[str, str]],
) -> None:
    team, operator, tokens = serving
    first, second = tokens

    def tell(pod: str, **more: Any) -> None:
        assert post(operator, tokens[pod], report(team, pod, **more)) == (200, {"accepted": True})

    def hot() -> int | None:
        tiers = team.get("bp", "pool")["status"].get("tiers")
        return tiers[0]["adapters"] if tiers else None

    tell(first, native="no shared memory in /dev/shm")
    tell(second, hot=3)
    message = team.until("bp", "pool", "BulkPublishing", status="False", reason="Mixed", words=first)
    assert "1 of 2 gateways" in message and "no shared memory in /dev/shm" in message
    until("both are summed", lambda: hot() == 5)
    table = team.cluster.run("-n", team.namespace, "get", "bp")
    head, row = (line.split() for line in table.splitlines())
    assert row[head.index("PUBLISH")] == "Mixed"
    assert team.get("bp", "pool")["status"]["engines"] == {"ready": 2, "starting": 0, "failed": 0}
    events = team.items("events.events.k8s.io")
    assert any(e["reason"] == "Mixed" and "no shared memory" in e["note"] for e in events)

    tell(first, hot=3)
    team.until("bp", "pool", "BulkPublishing", status="True", reason="Bulk")

    team.cluster.run("-n", team.namespace, "scale", "bp", "pool", "--replicas=1")
    (left,) = rollouts(team, n=1)
    until("the pod that went is not counted", lambda: hot() == 3, seconds=30)
    tell(left, hot=1)
    until("the one that stayed is", lambda: hot() == 1)
    until("one that says nothing any more is not", lambda: hot() is None, seconds=90)
    assert team.condition("bp", "pool", "BulkPublishing")[0] == ""
    assert team.condition("bp", "pool", "Ready")[0] == "True"


def test_many_reports_are_few_writes(serving: tuple[Team, OperatorProcess, dict[str, str]]) -> None:
    team, operator, tokens = serving
    numbers = itertools.count()
    for pod in tokens:
        post(operator, tokens[pod], report(team, pod))
    until("the first numbers are there", lambda: team.get("bp", "pool")["status"].get("tiers"))
    before, end, sent = operator.writes("BasePool"), time.monotonic() + 30, 0
    while time.monotonic() < end:
        for pod, token in tokens.items():
            post(operator, token, report(team, pod, hot=next(numbers) % 5))
            sent += 1
        time.sleep(0.2)
    assert sent > 100
    assert 2 <= operator.writes("BasePool") - before <= 4, "one in ten seconds"
