"""Whatever the order, and wherever the operator is killed, the same state is reached and then nothing is written."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele_operator.planning.model import PLANNED, Create, Obj, Options, Ref
from tests.planning.cluster import OPTIONS, Cluster
from tests.planning.resources import demo, pool, population, run, runtime, store

JOBS = Options(operator_url=OPTIONS.operator_url, image=OPTIONS.image, backend="Job")


def _live_templates(cluster: Cluster, kind: str) -> set[str]:
    return {
        cluster.raw(kind, r.name)["metadata"]["labels"]["allele.dev/template"]
        for r in cluster.refs(kind)
        if "allele.dev/template" in cluster.raw(kind, r.name)["metadata"]["labels"]
    }


@given(order=st.permutations([store, runtime, pool, population, run]))
def test_any_order_of_creation_ends_in_a_running_run(order: list[Any]) -> None:
    cluster = Cluster()
    for make in order:
        cluster.add(make())
        cluster.converge()
    assert cluster.raw("RLRun", "run")["status"]["phase"] == "Training"
    assert cluster.at_rest()


@given(order=st.permutations([store, runtime, pool, population, run]), options=st.sampled_from([OPTIONS, JOBS]))
def test_dependents_name_everything_that_must_be_planned_again(order: list[Any], options: Options) -> None:
    cluster = Cluster(options)
    for make in order:
        seen = cluster.snapshot()
        cluster.add(make())
        cluster.converge_by_events(seen)
        assert cluster.at_rest(), f"after {make.__name__}"
    assert cluster.raw("RLRun", "run")["status"]["phase"] == "Training"


@given(kills=st.lists(st.integers(0, 3), max_size=25))
def test_a_kill_after_any_write_changes_nothing_in_the_end(kills: list[int]) -> None:
    cluster = demo(Cluster(), run())
    for i, writes in enumerate(kills):
        refs = [r for kind in PLANNED for r in cluster.refs(kind)]
        cluster.reconcile(refs[i % len(refs)], writes=writes)
        cluster.controllers()
    cluster.converge()
    assert cluster.at_rest()
    assert len(cluster.refs("JobSet")) == 1
    assert len([r for r in cluster.refs("Job") if r.name.startswith("run-")]) == 1
    assert cluster.raw("RLRun", "run")["status"]["phase"] == "Training"


CHANGES: list[tuple[str, str, Obj]] = [
    ("AdapterRuntime", "runtime", {"spec": {"images": {"trainer": "trainer:2"}}}),
    ("AdapterRuntime", "runtime", {"spec": {"images": {"trainer": "trainer:1"}}}),
    ("BasePool", "pool", {"spec": {"trainer": {"slots": 32}}}),
    ("BasePool", "pool", {"spec": {"suspend": True}}),
    ("BasePool", "pool", {"spec": {"suspend": False}}),
    ("BasePool", "pool", {"spec": {"rollout": {"replicas": 3}}}),
    ("BasePool", "pool", {"spec": {"rollout": {"replicas": 0}}}),
    ("AdapterStore", "store", {"spec": {"endpoint": "http://other:7070"}}),
    ("RLRun", "run", {"spec": {"suspend": True}}),
    ("RLRun", "run", {"spec": {"suspend": False}}),
]


@given(steps=st.lists(st.sampled_from([*CHANGES, None]), max_size=14), options=st.sampled_from([OPTIONS, JOBS]))
def test_a_pool_never_has_two_workloads_of_different_templates(steps: list[Any], options: Options) -> None:
    cluster = demo(Cluster(options), run())
    for step in steps:
        if step is not None:
            cluster.edit(*step)
        for kind in PLANNED:
            for ref in cluster.refs(kind):
                for action in cluster.decide(ref).actions:
                    cluster.execute(action)
                    assert len(_live_templates(cluster, options.backend)) <= 1
                cluster.reconcile(ref)
        cluster.controllers()
    cluster.converge()
    assert cluster.at_rest()


def test_a_changed_template_waits_for_the_run_and_then_replaces_the_pods() -> None:
    cluster = demo(Cluster(), run())
    cluster.converge()
    (before,) = cluster.refs("JobSet")
    cluster.edit("AdapterRuntime", "runtime", {"spec": {"images": {"trainer": "trainer:2"}}})
    cluster.converge()
    assert cluster.refs("JobSet") == [before]
    up_to_date = cluster.raw("BasePool", "pool")["status"]["conditions"][-1]
    assert (up_to_date["status"], up_to_date["reason"]) == ("False", "RunsTraining")
    assert up_to_date["message"].endswith(": run")
    assert cluster.raw("BasePool", "pool")["status"]["jobSet"] == before.name
    cluster.finish("run")
    cluster.converge()
    (after,) = cluster.refs("JobSet")
    assert after != before
    assert cluster.raw("BasePool", "pool")["status"]["conditions"][-1]["status"] == "True"


def test_scaling_and_suspending_keep_the_jobset() -> None:
    cluster = demo(Cluster())
    cluster.converge()
    (before,) = cluster.refs("JobSet")
    rollout = f"{before.name}-rollout-0"
    for replicas in (3, 0, 2):
        cluster.edit("BasePool", "pool", {"spec": {"rollout": {"replicas": replicas}}})
        cluster.converge()
        assert cluster.raw("Job", rollout)["spec"]["parallelism"] == replicas
        assert cluster.raw("Job", rollout)["spec"]["completions"] >= 1
        assert cluster.raw("BasePool", "pool")["status"]["replicas"] == replicas
    for suspend in (True, False):
        cluster.edit("BasePool", "pool", {"spec": {"suspend": suspend}})
        cluster.converge()
        assert cluster.raw("JobSet", before.name)["spec"]["suspend"] is suspend
    assert cluster.refs("JobSet") == [before]


def test_with_a_queue_the_suspend_field_is_left_to_kueue() -> None:
    cluster = demo(Cluster())
    cluster.remove("BasePool", "pool")
    cluster.add(pool(labels={"kueue.x-k8s.io/queue-name": "research", "team": "a"}))
    cluster.converge()
    (ref,) = cluster.refs("JobSet")
    job_set = cluster.raw("JobSet", ref.name)
    assert job_set["spec"]["suspend"] is True
    assert job_set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "team" not in job_set["metadata"]["labels"]
    ready = cluster.raw("BasePool", "pool")["status"]["conditions"][0]
    assert ready["reason"] == "Queued"
    assert "queue research" in ready["message"]
    cluster.edit("JobSet", ref.name, {"spec": {"suspend": False}})
    cluster.converge()
    assert cluster.raw("JobSet", ref.name)["spec"]["suspend"] is False
    assert cluster.raw("BasePool", "pool")["status"]["phase"] == "Ready"
    cluster.edit("BasePool", "pool", {"spec": {"suspend": True}})
    cluster.converge()
    assert cluster.refs("JobSet") == []


def test_a_failed_jobset_is_made_anew_after_a_pause() -> None:
    cluster = demo(Cluster())
    cluster.converge()
    (ref,) = cluster.refs("JobSet")
    uid = cluster.raw("JobSet", ref.name)["metadata"]["uid"]
    failed = {"type": "Failed", "status": "True", "message": "too many restarts"}
    failed["lastTransitionTime"] = cluster.now.isoformat()
    cluster.edit("JobSet", ref.name, {"status": {"conditions": [failed]}})
    cluster.reconcile(Ref("BasePool", "ns", "pool"))
    decided = cluster.decide(Ref("BasePool", "ns", "pool"))
    assert decided.actions == ()
    assert decided.requeue == pytest.approx(60, abs=2)
    ready = cluster.raw("BasePool", "pool")["status"]["conditions"][0]
    assert (ready["reason"], "too many restarts" in ready["message"]) == ("JobSetFailed", True)
    cluster.now += timedelta(seconds=70)
    cluster.converge()
    assert cluster.raw("JobSet", ref.name)["metadata"]["uid"] != uid


def test_a_deleted_service_comes_back() -> None:
    cluster = demo(Cluster())
    cluster.converge()
    cluster.remove("Service", "pool-trainer")
    seen = cluster.snapshot()
    cluster.reconcile(Ref("BasePool", "ns", "pool"))
    assert Ref("Service", "ns", "pool-trainer") in cluster.snapshot()
    assert Ref("Service", "ns", "pool-trainer") not in seen


def test_an_older_namesakes_jobset_is_not_taken_over() -> None:
    """Create of a name that a deleted pool's JobSet still has: the plan keeps asking, the shell refuses."""
    cluster = demo(Cluster())
    cluster.converge()
    name = cluster.refs("JobSet")[0].name
    cluster.raw("JobSet", name)["metadata"]["ownerReferences"][0]["uid"] = "uid-of-the-former"
    decided = cluster.decide(Ref("BasePool", "ns", "pool"))
    assert [a.body["metadata"]["name"] for a in decided.actions if isinstance(a, Create)] == [name]
