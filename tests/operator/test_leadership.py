"""One leader at a time: takeover after a kill, release at SIGTERM, no write by a leader that slept and wakes up."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request

from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import Team, until

FAST = ("--lease-duration", "6", "--renew-deadline", "4", "--lease-retry", "0.5", "--lease-timeout", "1.5")


def holder(team: Team) -> str:
    return str(team.get("lease", "operator").get("spec", {}).get("holderIdentity", ""))


def test_a_standby_takes_over_when_the_leader_is_killed_and_at_once_when_it_is_stopped(
    team: Team, operators: StartOperator
) -> None:
    first = operators(team, flags=FAST).wait_until_leading()
    second = operators(team, flags=FAST)
    until("standing by", lambda: second.lines("standing by"))
    time.sleep(2)
    assert not second.leading
    with urllib.request.urlopen(second.url("/readyz"), timeout=5) as answer:
        assert answer.status == 200, "standing by is ready: the Service may send reports to it"

    killed = time.monotonic()
    first.kill()
    second.wait_until_leading()
    assert time.monotonic() - killed > 3, "a lease that may still be held was taken"

    third = operators(team, flags=FAST)
    until("standing by", lambda: third.lines("standing by"))
    stopped = time.monotonic()
    assert second.stop() == 0
    third.wait_until_leading()
    assert time.monotonic() - stopped < 4, "a released lease was waited for"
    assert third.stop() == 0 and holder(team) == ""


def test_a_leader_that_slept_for_long_exits_without_a_write(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    first = operators(team, flags=FAST, entry="crashing_operator", environ={"CRASH_AFTER": "0"}).wait_until_leading()
    second = operators(team, flags=FAST)
    team.until("ast", "store", "Reachable", status="True", seconds=240)
    first.process.send_signal(signal.SIGSTOP)
    written = first.log.read_text().count("\nwrite ")
    second.wait_until_leading()
    team.apply(team.pool())  # something for the sleeper to find
    until("a JobSet", lambda: team.items("jobset"))

    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(20) == 3
    assert first.lines("leadership lost")
    assert written and first.log.read_text().count("\nwrite ") == written
    assert len(team.items("jobset")) == 1
    assert f":{second.port}/" in holder(team)


def test_a_standby_passes_reports_on_to_the_leader(team: Team, operators: StartOperator) -> None:
    leader = operators(team, flags=FAST).wait_until_leading()
    standby = operators(team, flags=FAST)
    until("standing by", lambda: standby.lines("standing by"))

    def refused_by_leader() -> bool:
        try:
            urllib.request.urlopen(
                urllib.request.Request(standby.url("/v1/progress"), b"{}", {"Authorization": "Bearer x"}), timeout=5
            )
        except urllib.error.HTTPError as e:
            return e.code == 401
        return False

    until("the leader's verdict on a bad token", refused_by_leader, seconds=20)
    verdicts = {k: v for k, v in leader.metrics().items() if "progress_reports" in k}
    assert verdicts['allele_operator_progress_reports_total{result="Unauthenticated"}'] >= 1
