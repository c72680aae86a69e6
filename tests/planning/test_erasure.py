"""A population that is deleted with the policy Delete: one erase Job after another until one succeeds, then it goes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele_operator.planning.model import ERASE_FINALIZER, PLANNED, Create, Delete, Obj, Ref
from tests.planning.cluster import Cluster
from tests.planning.resources import demo, population, run

POPULATION = Ref("AdapterPopulation", "ns", "pop")
REFUSED = {"erased": False, "reason": "StoreRefused", "message": "403"}


def with_policy(*more: Obj, policy: str = "Delete", **spec: Any) -> Cluster:
    cluster = demo(Cluster())
    cluster.remove("AdapterPopulation", "pop")
    cluster.add(population(deletionPolicy=policy, **spec))
    for body in more:
        cluster.add(body)
    cluster.converge()
    return cluster


def erase_jobs(cluster: Cluster) -> list[str]:
    return [r.name for r in cluster.refs("Job") if r.name.startswith("pop-erase-")]


def there(cluster: Cluster) -> bool:
    return POPULATION in cluster.refs("AdapterPopulation")


def erased(cluster: Cluster) -> tuple[str, str, str]:
    found = next(c for c in cluster.raw("AdapterPopulation", "pop")["status"]["conditions"] if c["type"] == "Erased")
    return found["status"], found["reason"], found["message"]


def test_it_goes_when_its_folder_is_erased_and_says_so() -> None:
    cluster = with_policy()
    assert cluster.raw("AdapterPopulation", "pop")["metadata"]["finalizers"] == [ERASE_FINALIZER]
    cluster.delete("AdapterPopulation", "pop")
    assert there(cluster)
    cluster.converge()
    assert not there(cluster)
    assert cluster.log[-1] == "Normal Erased"
    cluster.converge()
    assert erase_jobs(cluster) == [], "the garbage collector took the Job"


def test_with_retain_it_goes_at_once_and_no_job_is_made() -> None:
    cluster = with_policy(policy="Retain")
    cluster.delete("AdapterPopulation", "pop")
    assert not there(cluster)
    cluster.converge()
    assert erase_jobs(cluster) == []


def test_the_policy_may_change_as_long_as_it_is_there() -> None:
    cluster = with_policy()
    cluster.edit("AdapterPopulation", "pop", {"spec": {"deletionPolicy": "Retain"}})
    cluster.converge()
    assert not cluster.raw("AdapterPopulation", "pop")["metadata"]["finalizers"]
    cluster.edit("AdapterPopulation", "pop", {"spec": {"deletionPolicy": "Delete"}})
    cluster.converge()
    assert cluster.raw("AdapterPopulation", "pop")["metadata"]["finalizers"] == [ERASE_FINALIZER]


def test_the_job_is_made_when_the_run_has_ended() -> None:
    cluster = with_policy(run())
    cluster.delete("AdapterPopulation", "pop")
    cluster.converge()
    assert erased(cluster)[:2] == ("False", "RunsActive") and erase_jobs(cluster) == []
    assert cluster.at_rest()
    seen = cluster.snapshot()
    cluster.finish("run")
    cluster.converge_by_events(seen)
    assert not there(cluster)


def test_a_deleted_run_is_waited_for_until_its_driver_is_gone() -> None:
    cluster = with_policy(run())
    cluster.delete("AdapterPopulation", "pop")
    cluster.delete("RLRun", "run")
    decided = cluster.decide(POPULATION)
    assert decided.status is not None and not any(isinstance(a, Create) for a in decided.actions)
    cluster.converge()
    assert not there(cluster)


def test_a_failure_is_told_and_tried_again_ever_more_rarely() -> None:
    cluster = with_policy()
    cluster.erase = dict(REFUSED)
    cluster.delete("AdapterPopulation", "pop")
    waits: list[float] = []
    for _ in range(9):
        while not (erase_jobs(cluster) and cluster.at_rest()):
            cluster.reconcile(POPULATION)
            cluster.controllers()
            cluster.now += timedelta(seconds=1)
        assert erased(cluster)[:2] == ("False", "StoreRefused") and erased(cluster)[2].startswith("403; with spec.")
        decided = cluster.decide(POPULATION)
        assert decided.requeue is not None
        waits.append(decided.requeue)
        cluster.now += timedelta(seconds=decided.requeue)
        assert [type(a) for a in cluster.decide(POPULATION).actions] == [Delete]
        cluster.reconcile(POPULATION)
        cluster.controllers()
    assert waits == sorted(waits) and waits[0] <= 10 and waits[-1] == pytest.approx(300, abs=2), waits
    assert [line for line in cluster.log if "StoreRefused" in line] == ["Warning StoreRefused"], "told once"
    cluster.erase = {"erased": True, "reason": "Erased", "message": "all"}
    cluster.converge()
    assert not there(cluster)


def test_what_another_population_owns_by_now_lets_it_go() -> None:
    cluster = with_policy()
    cluster.erase = {"erased": True, "reason": "OwnedByAnother", "message": "nothing was deleted"}
    cluster.delete("AdapterPopulation", "pop")
    cluster.converge()
    assert not there(cluster) and cluster.log[-1] == "Normal OwnedByAnother"


def test_a_pod_that_cannot_start_says_why() -> None:
    cluster = with_policy()
    cluster.delete("AdapterPopulation", "pop")
    cluster.reconcile(POPULATION)
    cluster.erase = {}
    cluster.controllers()
    (job,) = erase_jobs(cluster)
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}}
    cluster.edit(
        "Pod", f"{job}-0", {"status": {"phase": "Pending", "containerStatuses": [{"name": "erase", "state": waiting}]}}
    )
    cluster.reconcile(POPULATION)
    status, reason, message = erased(cluster)
    assert (status, reason) == ("False", "SecretMissing") and 'secret "s3" not found' in message and "Retain" in message


def test_other_access_to_the_store_makes_another_job_when_the_first_is_gone() -> None:
    cluster = with_policy()
    cluster.erase = dict(REFUSED)
    cluster.delete("AdapterPopulation", "pop")
    for _ in range(3):
        cluster.reconcile(POPULATION)
        cluster.controllers()
    (before,) = erase_jobs(cluster)
    cluster.edit("AdapterStore", "store", {"spec": {"credentials": {"secretName": "other"}}})
    cluster.erase = {"erased": True, "reason": "Erased", "message": "all"}
    cluster.reconcile(Ref("AdapterStore", "ns", "store"))
    for _ in range(4):
        cluster.reconcile(Ref("AdapterStore", "ns", "store"))
        cluster.controllers()
    decided = cluster.decide(POPULATION)
    assert [type(a) for a in decided.actions] == [Delete], "two at once never"
    cluster.reconcile(POPULATION)
    assert before not in erase_jobs(cluster) or cluster.raw("Job", before)["metadata"]["deletionTimestamp"]
    cluster.converge()
    assert not there(cluster)


def test_collection_is_over_before_erasure_begins() -> None:
    cluster = with_policy(retention={"schedule": "0 3 * * *"})
    cluster.collect = {}
    cluster.tick()
    cluster.controllers()
    (cron,) = cluster.refs("CronJob")
    cluster.delete("AdapterPopulation", "pop")
    decided = cluster.decide(POPULATION)
    assert [type(a) for a in decided.actions] == [Delete]
    cluster.reconcile(POPULATION)
    assert erased(cluster)[:2] == ("False", "CollectionActive") and cron.name in erased(cluster)[2]
    cluster.converge()
    assert not cluster.refs("CronJob") and not there(cluster)


def test_in_a_namespace_that_ends_it_goes_without_a_job() -> None:
    cluster = with_policy(run())
    cluster.ending = True
    cluster.delete("AdapterPopulation", "pop")
    cluster.remove("AdapterStore", "store")
    cluster.converge()
    assert not there(cluster) and erase_jobs(cluster) == []
    assert "Warning NamespaceTerminating" in cluster.log


@given(kills=st.lists(st.integers(0, 2), max_size=25), runs=st.booleans())
def test_killed_after_any_write_it_is_erased_by_one_job(kills: list[int], runs: bool) -> None:
    cluster = with_policy(*([run()] if runs else []), retention={"schedule": "0 3 * * *"})
    cluster.delete("AdapterPopulation", "pop")
    if runs:
        cluster.finish("run")
    made: set[str] = set()
    for i, writes in enumerate(kills):
        refs = [r for kind in PLANNED for r in cluster.refs(kind)]
        cluster.reconcile(refs[i % len(refs)], writes=writes)
        made |= {cluster.raw("Job", n)["metadata"]["uid"] for n in erase_jobs(cluster)}
        cluster.controllers()
    cluster.converge()
    assert len(made) <= 1 and not there(cluster)
