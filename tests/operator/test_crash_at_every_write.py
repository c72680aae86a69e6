"""Killed right after any of its writes, the operator's successor finishes the work without a second child of any kind.

The kill comes when the answer to the k-th write has arrived, for every k until the work is done before the k-th. Each
round's objects are new; store and runtime (and for runs the pool) are there before.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.operator.conftest import StartOperator
from tests.operator.operator_harness import Obj, Team, names, until
from tests.operator.trained import claimed, folder

Made = dict[str, list[str]]
GONE_OR_NOT = ("--ignore-not-found", "--wait=false")


def crash_at_every_write(
    team: Team,
    operators: StartOperator,
    *,
    objects: Callable[[str], list[Obj]],
    done: Callable[[str], bool],
    made: Callable[[str], Made],
    expected: Callable[[str, Made], bool],
    begin: Callable[[str], None] = lambda name: None,
) -> int:
    """Number of writes after which the operator was killed. The functions take the name of the round; `begin` is called
    when its objects are there."""
    for k in range(1, 40):
        name = f"r{k}"
        first = operators(team, entry="crashing_operator", environ={"CRASH_AFTER": str(k)}, lease=f"{name}-a")
        team.apply(*objects(name))
        begin(name)
        until(f"round {name} is done or killed", lambda p=first, n=name: p.dead or done(n), seconds=240)
        if not first.dies_within(2.0):  # what is seen here may be the k-th write itself, the kill on its way
            first.kill()
            assert expected(name, made(name)), made(name)
            return k - 1
        assert first.process.returncode == -signal.SIGKILL, first.tail()
        before = made(name)
        second = operators(team, lease=f"{name}-b")
        until(f"round {name} is done", lambda p=second, n=name: p.dead or done(n), seconds=240, detail=second.tail)
        assert not second.dead, second.tail()
        after = made(name)
        assert expected(name, after), after
        assert all(set(before[kind]) <= set(after[kind]) for kind in after), f"made again: {before} {after}"
        second.kill()
        for o in objects(name):
            head = o["metadata"]
            team.cluster.run("-n", head["namespace"], "delete", o["kind"], head["name"], *GONE_OR_NOT)
    raise AssertionError("the operator never got through alive")


def uids(objects: list[Obj]) -> list[str]:
    return sorted(f"{o['metadata']['name']}/{o['metadata']['uid']}" for o in objects)


def test_a_pool_is_made_once(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    reach_the_store(team, operators)

    def made(name: str) -> Made:
        selector = f"allele.dev/pool={name},allele.dev/role"
        return {kind: uids(team.items(kind, selector)) for kind in ("service", "jobset")}

    def expected(name: str, found: Made) -> bool:
        return len(found["service"]) == 3 and len(found["jobset"]) == 1

    kills = crash_at_every_write(
        team,
        operators,
        objects=lambda name: [team.pool(name, suspend=True)],
        done=lambda name: team.condition("bp", name, "Ready")[1] == "Suspended",
        made=made,
        expected=expected,
    )
    assert kills >= 5, "three Services, the JobSet and a status at least"
    assert len(team.items("job", "allele.dev/store=store")) == 1


def test_a_run_is_driven_by_one_job(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    reach_the_store(team, operators, pool=True)

    def made(name: str) -> Made:
        return {kind: uids(team.items(kind, f"allele.dev/run={name}")) for kind in ("job", "configmap")}

    def objects(name: str) -> list[Obj]:
        return [team.population(name), team.rl_run(name, population=name, steps=2)]

    kills = crash_at_every_write(
        team,
        operators,
        objects=objects,
        done=lambda name: over(team, name),
        made=made,
        expected=lambda name, found: len(found["job"]) == 1 and len(found["configmap"]) == 1,
    )
    assert kills >= 6, "finalizer, ConfigMap, Job, two statuses and the finalizer again at least"


def test_a_deleted_population_is_erased_by_one_job(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    reach_the_store(team, operators)

    def objects(name: str) -> list[Obj]:
        """With its finalizer, which the operator may not have had the time to add."""
        body = team.population(name, deletionPolicy="Delete")
        return [body | {"metadata": body["metadata"] | {"finalizers": ["allele.dev/erase"]}}]

    def begin(name: str) -> None:
        claimed(team, name).write_segments({"m": b"weights"})
        team.cluster.run("-n", team.namespace, "delete", "apop", name, "--wait=false")

    def made(name: str) -> Made:
        """Pods of erase Jobs, which are gone by then: events tell of them."""
        told = (e for e in team.items("events.events.k8s.io") if e["reason"] == "SuccessfulCreate")
        return {"pods": [e["note"] for e in told if e["regarding"]["name"].startswith(f"{name}-erase-")]}

    def expected(name: str, found: Made) -> bool:
        return len(found["pods"]) == 1 and not list(folder(team, name).objects.list())

    kills = crash_at_every_write(
        team,
        operators,
        objects=objects,
        begin=begin,
        done=lambda name: not team.get("apop", name),
        made=made,
        expected=expected,
    )
    assert kills >= 5, "a status, the Job, a status, its event and the finalizer at least"


def over(team: Team, run: str) -> bool:
    """Succeeded, and the members given back."""
    found = team.get("rlrun", run)
    conditions = {c["type"]: c["status"] for c in found.get("status", {}).get("conditions", [])}
    return conditions.get("Succeeded") == "True" and not found["metadata"].get("finalizers")


def reach_the_store(team: Team, operators: StartOperator, *, pool: bool = False) -> None:
    operator = operators(team, lease="before").wait_until_leading()
    if pool:
        team.apply(team.pool())
        team.until("bp", "pool", "Ready", status="True", seconds=240)
    team.until("ast", "store", "Reachable", status="True", seconds=240)
    assert list(names(team.items("adapterruntime"))) == ["runtime"]
    operator.stop()
