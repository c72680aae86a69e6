"""Progress from real pods with real projected tokens; one status write per interval; nothing written at rest."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import pytest

from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import OperatorProcess, Team, names, settled, until


def driver_pod(team: Team, run: str = "run") -> str:
    selector = f"allele.dev/run={run},allele.dev/role=driver"
    return str(until("a driver pod", lambda: next(names(team.items("pod", selector)), "")))


def token(team: Team, pod: str, audience: str = "allele-operator") -> str:
    """Bound to the pod, as kubelet projects it."""
    arguments = ["create", "token", "default", "--audience", audience, "--bound-object-kind", "Pod"]
    return team.cluster.run("-n", team.namespace, *arguments, "--bound-object-name", pod).strip()


def post(operator: OperatorProcess, bearer: str, report: dict[str, object]) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(
        operator.url("/v1/progress"), json.dumps(report).encode(), {"Authorization": f"Bearer {bearer}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def report_of(team: Team, run: str = "run", **more: object) -> dict[str, object]:
    uid = team.get("rlrun", run)["metadata"]["uid"]
    head = {"namespace": team.namespace, "run": run, "uid": uid, "epoch": 2**31, "phase": "Training"}
    return head | {"step": 7, "steps": 10_000} | more


@pytest.fixture
def training(ready_team: Team, operators: StartOperator) -> tuple[Team, OperatorProcess]:
    """A run whose driver reports five times a second, through the network, for as long as the test goes."""
    operator = operators(ready_team).wait_until_leading()
    ready_team.apply(ready_team.pool(), ready_team.population(), ready_team.rl_run(steps=10_000))
    until(
        "progress in the status",
        lambda: ready_team.get("rlrun", "run").get("status", {}).get("progress", {}).get("step"),
        seconds=240,
        detail=operator.tail,
    )
    return ready_team, operator


def test_only_a_drivers_own_token_is_taken(training: tuple[Team, OperatorProcess]) -> None:
    team, operator = training
    pod = driver_pod(team)
    trainer = next(names(team.items("pod", "allele.dev/role=trainer")))
    report = report_of(team)
    mounted = team.cluster.run("-n", team.namespace, "exec", pod, "--", "cat", "/allele/token/token")

    assert post(operator, token(team, pod, "https://kubernetes.default.svc"), report)[0] == 401
    assert post(operator, "garbage", report)[0] == 401
    assert post(operator, "", report)[0] == 401
    unbound = ["create", "token", "default", "--audience", "allele-operator"]
    assert post(operator, team.cluster.run("-n", team.namespace, *unbound).strip(), report)[0] == 401
    code, answer = post(operator, token(team, trainer), report)
    assert (code, answer["code"]) == (403, "Forbidden"), answer
    assert post(operator, mounted, report | {"run": "other"})[0] == 403
    code, answer = post(operator, mounted, report | {"step": "many"})
    assert (code, answer["code"]) == (422, "InvalidRequest") and "step" in str(answer["message"])

    assert post(operator, mounted, report) == (200, {"accepted": True})
    code, answer = post(operator, token(team, pod), report | {"epoch": 1})
    assert (code, answer["code"]) == (409, "StaleEpoch")


def test_progress_is_written_once_per_interval_and_not_with_every_report(
    training: tuple[Team, OperatorProcess],
) -> None:
    team, operator = training
    time.sleep(11)  # the writes that came with the start are over

    def seen() -> tuple[float, float, int]:
        accepted = operator.metrics()['allele_operator_progress_reports_total{result="Accepted"}']
        return operator.writes("RLRun"), accepted, team.get("rlrun", "run")["status"]["progress"]["step"]

    writes, reports, step = seen()
    time.sleep(30)
    more_writes, more_reports, later = seen()
    assert more_reports - reports > 60, "the driver reports on"
    assert 2 <= more_writes - writes <= 4, "one in ten seconds"
    assert later > step + 60


def test_nothing_is_written_at_rest(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    operator = operators(team).wait_until_leading()
    team.apply(team.pool(), team.population(), team.rl_run(steps=3))
    team.until("rlrun", "run", "Succeeded", status="True", seconds=240)
    before = settled(operator, quiet=12)
    time.sleep(10)
    assert operator.writes() == before
    operator.stop()

    again = operators(team, lease="second").wait_until_leading()
    settled(again, quiet=12)
    assert again.writes() == 0, f"a restart has nothing to say: {again.metrics()}"


def test_a_probe_that_fails_is_a_condition_and_one_event_and_passes_with_the_next(
    training: tuple[Team, OperatorProcess],
) -> None:
    team, operator = training
    bearer = token(team, driver_pod(team))

    def tell(reason: str, failing: int, message: str) -> None:
        probes = {"reason": reason, "failing": failing, "message": message}
        assert post(operator, bearer, report_of(team, probes=probes)) == (200, {"accepted": True})

    def notes(kind: str, reason: str) -> list[str]:
        events = team.items("events.events.k8s.io")
        return [e["note"] for e in events if (e["regarding"]["kind"], e["reason"]) == (kind, reason)]

    for step in range(3):
        said = f"g-0003@{step}: Gap (max gap 0.3{step} of at most 0.0001)"
        tell("Gap", 1, said)
        assert said in team.until("rlrun", "run", "Exposed", status="False", reason="Gap", words=said)
        assert "RLRun run: " in team.until("apop", "population", "Exposed", status="False", reason="Gap", words=said)
    team.until("rlrun", "run", "Running", status="True")
    assert [n[:8] for n in notes("RLRun", "Gap")] == ["g-0003@0"], "numbers of later steps are in the condition"
    assert len(notes("AdapterPopulation", "Gap")) == 1

    tell("NotMoved", 2, "g-0003@4 and g-0001@4")
    team.until("rlrun", "run", "Exposed", status="False", reason="NotMoved")
    until("another kind is another event", lambda: len(notes("RLRun", "NotMoved")) == 1)
    tell("ProbesPassed", 0, "the newest probe of every member passed")
    team.until("rlrun", "run", "Exposed", status="True", reason="ProbesPassed")
    team.until("apop", "population", "Exposed", status="True", reason="ProbesPassed")
    assert [len(notes("RLRun", reason)) for reason in ("Gap", "NotMoved")] == [1, 1]
