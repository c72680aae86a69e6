"""A schedule makes a CronJob, and what its last pass did stands in the population's status."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from allele.store import Fact, PopulationStore
from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import Obj, Team, until
from tests.operator.trained import claimed

NEVER = "0 0 29 2 *"
"""On the leap day: passes are started by hand."""


def population(team: Team, schedule: str | None) -> Obj:
    return team.population(retention={"schedule": schedule, "keepLast": 1, "graceHours": 1} if schedule else {})


def train(team: Team) -> PopulationStore:
    """Four revisions of long ago: the first commit that retires some has nothing to wait for."""
    store = claimed(team, "population")
    writer = store.catalogue.start("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allele.store.facts.now", lambda: datetime(2020, 1, 1, tzinfo=UTC))
        for step in range(1, 5):
            place = store.write_segments({"m": b"weights"})["m"]
            writer.commit(step, [Fact.committed(member="m", revision=step, weights=place, shape="s")])
    return store


def cron_job(team: Team) -> Obj:
    found = team.items("cronjob", "allele.dev/population=population")
    return found[0] if found else {}


def start_pass(team: Team, name: str) -> None:
    cron = until("the CronJob", lambda: cron_job(team))["metadata"]["name"]
    team.cluster.run("-n", team.namespace, "create", "job", name, f"--from=cronjob/{cron}")


@pytest.fixture
def leading(ready_team: Team, operators: StartOperator) -> Team:
    operators(ready_team).wait_until_leading()
    return ready_team


def test_a_pass_runs_by_the_schedule_and_tells_what_it_did(leading: Team) -> None:
    team = leading
    team.apply(population(team, "* * * * *"))
    team.until("apop", "population", "Collected", status="Unknown", reason="Scheduled", seconds=240)
    store = train(team)
    message = team.until("apop", "population", "Collected", status="True", words="retired 1", seconds=240)
    assert message.startswith("retired 1 revisions at 20") and message.endswith(" UTC")
    assert [f.revision for f in store.catalogue.facts() if f.kind == "Retired"] == [1], "the lag of 1 keeps three"
    assert [e["type"] for e in team.items("events.events.k8s.io") if e["reason"] == "Collected"] == ["Normal"]
    team.apply(population(team, None))
    until("the CronJob is gone", lambda: not cron_job(team))
    assert team.condition("apop", "population", "Collected") == ("", "", "")


def test_a_pass_that_fails_says_why_and_the_next_good_one_takes_it_back(leading: Team, s3: Any) -> None:
    team = leading
    team.apply(population(team, NEVER))
    team.until("apop", "population", "Collected", status="Unknown", reason="Scheduled", seconds=240)
    store = train(team)
    record = store.objects.get("population.json")
    store.objects.put("population.json", b"damaged")
    start_pass(team, "first")
    team.until("apop", "population", "Collected", status="False", reason="OwnershipError", seconds=240)
    store.objects.put("population.json", record)
    start_pass(team, "second")
    team.until("apop", "population", "Collected", status="True", words="retired 1", seconds=240)


def test_what_the_api_server_refuses_in_a_schedule_is_told(leading: Team) -> None:
    team = leading
    team.apply(population(team, "99 * * * *"))

    def told() -> list[str]:
        events = team.items("events.events.k8s.io")
        return [e["note"] for e in events if e["reason"] == "Refused" and "schedule" in e["note"]]

    (note,) = until("an event with the API server's words", told)
    assert "above maximum (59)" in note or "end of range (99)" in note, note
    team.until("apop", "population", "Collected", status="Unknown", reason="NotScheduled")
    team.apply(population(team, NEVER))
    team.until("apop", "population", "Collected", status="Unknown", reason="Scheduled", seconds=120)


def test_a_deleted_population_takes_its_cronjob_along(leading: Team) -> None:
    team = leading
    team.apply(population(team, NEVER))
    until("the CronJob", lambda: cron_job(team))
    team.cluster.run("-n", team.namespace, "delete", "apop/population", "--wait=false")
    until("the CronJob is gone", lambda: not cron_job(team))
