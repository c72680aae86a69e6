"""Killed right after any write of a pool's and a run's creation, the next operator finishes the work without a second
child of any kind.

Each round's pool and population are new, the store is the same: its probe is one write among the first round's.
"""

from __future__ import annotations

import signal

from conftest import StartOperator
from operator_harness import OperatorProcess, Team, names, until


def created(team: Team, pool: str) -> dict[str, list[str]]:
    selector = f"allele.dev/pool={pool}"
    return {kind: sorted(names(team.items(kind, selector))) for kind in ("service", "jobset")}


def test_a_kill_after_any_write_leaves_nothing_twice(ready_team: Team, operators: StartOperator) -> None:
    team = ready_team
    killed = []
    for k in range(1, 60):
        pool, population, run = f"pool-{k}", f"population-{k}", f"run-{k}"
        first = operators(team, entry="crashing_operator", environ={"CRASH_AFTER": str(k)}, lease=f"k{k}-a")
        spec = team.rl_run(run, population=population, steps=2)
        spec["spec"]["poolRef"] = pool
        team.apply(team.pool(pool), team.population(population), spec)
        done = until(
            "the run is over or the operator is dead", lambda p=first, r=run: p.dead or over(team, r), seconds=240
        )
        assert done
        if not first.dead:
            first.kill()
            assert len(killed) >= 8, f"expected a pool and a run to take at least 8 writes, found {killed}"
            break
        assert first.process.returncode == -signal.SIGKILL, first.tail()
        killed.append(k)
        before = created(team, pool)
        second = operators(team, lease=f"k{k}-b")
        check(team, second, pool=pool, run=run, before=before)
        second.stop()
        team.cluster.run("-n", team.namespace, "delete", f"rlrun/{run}", f"bp/{pool}", f"apop/{population}")
    else:
        raise AssertionError("the operator never got through alive")


def over(team: Team, run: str) -> bool:
    return team.condition("rlrun", run, "Succeeded")[0] == "True"


def check(team: Team, operator: OperatorProcess, *, pool: str, run: str, before: dict[str, list[str]]) -> None:
    """It converges; what the dead one made is still there, by name, and nothing beside it."""
    until(f"{run} is over", lambda: over(team, run) or operator.dead, seconds=240, detail=operator.tail)
    assert not operator.dead, operator.tail()
    now = created(team, pool)
    assert all(set(before[kind]) <= set(now[kind]) for kind in now), (before, now)
    assert now["service"] == [pool, f"{pool}-rollout", f"{pool}-trainer"] and len(now["jobset"]) == 1, now
    assert len(team.items("job", f"allele.dev/run={run}")) == 1
    assert len(team.items("configmap", f"allele.dev/run={run}")) == 1
    assert len(team.items("job", "allele.dev/store=store")) == 1
