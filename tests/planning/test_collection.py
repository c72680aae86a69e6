"""Scheduled collection: what the CronJob is given to keep, and what the population says of the last pass."""

from __future__ import annotations

from typing import Any

import pytest

from allele.api.population import Retention
from allele_operator.planning.collection import kept
from allele_operator.planning.model import Obj, Ref
from tests.planning.cluster import Cluster
from tests.planning.resources import demo, population, run

POPULATION = Ref("AdapterPopulation", "ns", "pop")


def scheduled(*more: Obj, **retention: Any) -> Cluster:
    cluster = demo(Cluster())
    cluster.remove("AdapterPopulation", "pop")
    cluster.add(population(retention={"schedule": "17 3 * * *"} | retention))
    for body in more:
        cluster.add(body)
    cluster.converge()
    return cluster


def collected(cluster: Cluster) -> tuple[str, str, str]:
    conditions = cluster.raw("AdapterPopulation", "pop")["status"]["conditions"]
    found = next(c for c in conditions if c["type"] == "Collected")
    return found["status"], found["reason"], found["message"]


def arguments(cluster: Cluster) -> list[str]:
    (ref,) = cluster.refs("CronJob")
    job = cluster.raw("CronJob", ref.name)["spec"]["jobTemplate"]["spec"]
    words: list[str] = job["template"]["spec"]["containers"][0]["command"]
    return words[words.index("--keep-last") : words.index("--termination-log")]


def finished_run(name: str, condition: str) -> Obj:
    body = run(name, uid=name, pace={"maxPolicyLag": 60})
    return body | {"status": {"conditions": [{"type": condition, "status": "True"}]}}


def test_kept_is_what_retention_and_unfinished_runs_need() -> None:
    runs = [
        run("b", uid="uid-b", pace={"maxPolicyLag": 3}),
        run("a", uid="uid-a", suspend=True),
        run("other", uid="uid-other", populationRef="others", pace={"maxPolicyLag": 50}),
        finished_run("done", "Succeeded"),
        finished_run("broken", "Failed"),
    ]
    found = kept(Retention(keep_last=2, every=10, grace_hours=1), runs, "pop")
    assert (found.keep_last, found.every, found.grace_hours) == (2, 10, 1)
    assert (found.max_policy_lag, found.runs) == (3, ("uid-a", "uid-b"))
    assert kept(Retention(), [], "pop").max_policy_lag == 1


def test_the_cronjob_follows_runs_and_retention() -> None:
    cluster = scheduled(keepLast=3)
    usual = ["--keep-last", "3", "--every", "0", "--grace-hours", "24", "--max-policy-lag", "1"]
    assert arguments(cluster) == usual
    seen = cluster.snapshot()
    cluster.add(run(uid="uid-r", pace={"maxPolicyLag": 2}))
    cluster.converge_by_events(seen)
    assert arguments(cluster) == [*usual[:-1], "2", "--run", "uid-r"]
    cluster.finish("run")
    cluster.converge()
    assert arguments(cluster) == usual
    cluster.edit("AdapterPopulation", "pop", {"spec": {"retention": {"schedule": "0 4 * * *", "every": 5}}})
    cluster.converge()
    (ref,) = cluster.refs("CronJob")
    assert cluster.raw("CronJob", ref.name)["spec"]["schedule"] == "0 4 * * *"
    assert arguments(cluster)[3] == "5"
    assert cluster.at_rest()


def test_without_a_schedule_there_is_no_cronjob_and_no_condition() -> None:
    cluster = scheduled()
    cluster.edit("AdapterPopulation", "pop", {"spec": {"retention": {"schedule": None}}})
    cluster.converge()
    assert cluster.refs("CronJob") == []
    assert [c["type"] for c in cluster.raw("AdapterPopulation", "pop")["status"]["conditions"]] == ["Ready"]


def test_a_deleted_cronjob_comes_back() -> None:
    cluster = scheduled()
    (before,) = cluster.refs("CronJob")
    seen = cluster.snapshot()
    cluster.remove("CronJob", before.name)
    cluster.converge_by_events(seen)
    assert cluster.refs("CronJob") == [before]


def test_the_last_pass_is_told_and_stays_told_when_its_job_is_gone() -> None:
    cluster = scheduled()
    assert collected(cluster) == ("Unknown", "Scheduled", "the first pass is due by '17 3 * * *', UTC")
    seen = cluster.snapshot()
    cluster.tick()
    cluster.converge_by_events(seen)
    first = collected(cluster)
    assert first[:2] == ("True", "Collected")
    assert first[2] == f"retired 12 revisions at {cluster.now:%Y-%m-%d %H:%M} UTC"
    assert cluster.log[-1] == "Normal Collected" and cluster.at_rest()
    for ref in [*cluster.refs("Pod"), *cluster.refs("Job")]:
        if "-collect-" in ref.name:
            cluster.remove(ref.kind, ref.name)
    cluster.converge()
    assert collected(cluster) == first


@pytest.mark.parametrize(
    ("report", "reason", "words"),
    [
        (
            {"collected": False, "reason": "StoreUnavailable", "message": "no answer"},
            "StoreUnavailable",
            "no answer at 20",
        ),
        ({"collected": False, "reason": "Damaged", "message": "1 damaged"}, "Damaged", "1 damaged at 20"),
        ({"no": "report"}, "PodFailed", 'exit code 1: {"no": "report"} at 20'),
    ],
)
def test_a_pass_that_failed_says_why(report: Obj, reason: str, words: str) -> None:
    cluster = scheduled()
    cluster.collect = report
    cluster.tick()
    cluster.converge()
    assert collected(cluster)[:2] == ("False", reason)
    assert words in collected(cluster)[2]
    assert cluster.log[-1] == f"Warning {reason}"


def test_the_newest_of_several_passes_counts_and_one_at_work_does_not() -> None:
    cluster = scheduled()
    cluster.collect = {"collected": False, "reason": "StoreUnavailable", "message": "no answer"}
    cluster.tick()
    cluster.converge()
    cluster.collect = {"collected": True, "reason": "Collected", "message": "fine again"}
    cluster.tick()
    cluster.converge()
    told = collected(cluster)
    assert told[:2] == ("True", "Collected") and told[2].startswith("fine again")
    cluster.collect = {}
    cluster.tick()
    cluster.converge()
    assert collected(cluster) == told


def test_a_pass_that_cannot_start_says_why() -> None:
    cluster = scheduled()
    cluster.collect = {}
    cluster.tick()
    cluster.controllers()
    (pod,) = [r for r in cluster.refs("Pod") if "-collect-" in r.name]
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    change = {"status": {"phase": "Pending", "containerStatuses": [{"name": "collect", "state": waiting}]}}
    cluster.edit("Pod", pod.name, change)
    cluster.reconcile(POPULATION)
    assert collected(cluster)[:2] == ("False", "ImageUnavailable")


def test_a_namesakes_cronjob_is_another() -> None:
    first, second = (scheduled().refs("CronJob"), None)
    cluster = demo(Cluster(), run())
    cluster.remove("AdapterPopulation", "pop")
    cluster.add(population(retention={"schedule": "17 3 * * *"}))
    cluster.converge()
    second = cluster.refs("CronJob")
    assert first != second
