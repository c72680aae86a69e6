"""No two runs train the same member, however their plans interleave; and who goes first is not a matter of luck."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele_operator.planning import selection
from allele_operator.planning.model import Obj, Plan, Ref
from tests.planning.cluster import Cluster
from tests.planning.resources import demo, pool, population, run, runtime, store, train

SELECTIONS = st.one_of(
    st.builds(lambda f, n: [train(range={"first": f, "count": n})], st.integers(0, 12), st.integers(1, 4)),
    st.builds(lambda i: [train(names=[f"g-{i:04d}"])], st.integers(0, 15)),
    st.just([train()]),
)
TIMES = st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"])
RUNS = st.lists(st.tuples(SELECTIONS, TIMES), min_size=2, max_size=4)


def _members(body: Obj) -> set[int]:
    """Members by their indices, worked out without the code under test."""
    select = body["spec"]["groups"][0]["select"]
    if "names" in select:
        return {int(n.split("-")[1]) for n in select["names"]}
    span = select.get("range", {"first": 0, "count": 16})
    return set(range(span["first"], span["first"] + span["count"]))


def _with_job(cluster: Cluster) -> list[str]:
    return [
        r.name
        for r in cluster.refs("RLRun")
        if cluster.owned(cluster.raw("RLRun", r.name)["metadata"]["uid"], "Job")
        and cluster.raw("RLRun", r.name).get("status", {}).get("phase") not in ("Succeeded", "Failed")
    ]


def _apart(cluster: Cluster) -> None:
    for a, b in combinations(_with_job(cluster), 2):
        common = _members(cluster.raw("RLRun", a)) & _members(cluster.raw("RLRun", b))
        assert not common, f"{a} and {b} both train {common}"


def _ready(*runs: Obj) -> Cluster:
    cluster = demo(Cluster())
    cluster.converge()
    for body in runs:
        cluster.add(body)
    return cluster


@given(runs=RUNS, schedule=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_overlapping_runs_never_both_have_a_driver(runs: list[Any], schedule: list[tuple[int, bool]]) -> None:
    """Workers plan and execute action by action, each while the others do; users suspend and resume meanwhile."""
    cluster = _ready(*(run(f"r{i}", groups=g, created=t) for i, (g, t) in enumerate(runs)))
    open_plans: dict[Ref, list[Any]] = {}
    refs = cluster.refs("RLRun")
    for step, toggle in schedule:
        ref = refs[step % len(refs)]
        if toggle:
            suspended = cluster.raw("RLRun", ref.name)["spec"]["suspend"]
            cluster.edit("RLRun", ref.name, {"spec": {"suspend": not suspended}})
        elif open_plans.get(ref):
            todo = open_plans[ref].pop(0)
            if isinstance(todo, Plan):
                cluster.write_status(ref, todo)
            else:
                cluster.execute(todo)
            _apart(cluster)
        else:
            decided = cluster.decide(ref)
            open_plans[ref] = [*decided.actions, decided]
    for ref in refs:
        cluster.edit("RLRun", ref.name, {"spec": {"suspend": False}})
    _all_get_their_turn(cluster)


def _all_get_their_turn(cluster: Cluster) -> None:
    for _ in cluster.refs("RLRun"):
        cluster.converge()
        _apart(cluster)
        for name in _with_job(cluster):
            cluster.finish(name)
    cluster.converge()
    assert cluster.at_rest()
    assert {cluster.raw("RLRun", r.name)["status"]["phase"] for r in cluster.refs("RLRun")} == {"Succeeded"}
    assert all(not cluster.raw("RLRun", r.name)["metadata"]["finalizers"] for r in cluster.refs("RLRun"))


@pytest.mark.parametrize("replanned", [("early", "late"), ("late", "early"), ("both",)])
def test_of_two_that_announced_themselves_at_once_the_later_withdraws(replanned: tuple[str, ...]) -> None:
    cluster = _ready(run("early", suspend=True), run("late"))
    early, late = Ref("RLRun", "ns", "early"), Ref("RLRun", "ns", "late")
    announcing = [cluster.decide(late)]
    cluster.edit("RLRun", "early", {"spec": {"suspend": False}})
    announcing.append(cluster.decide(early))
    for decided in announcing:
        assert [type(a).__name__ for a in decided.actions] == ["AddFinalizer"]
        cluster.execute(decided.actions[0])
    if replanned == ("both",):
        for decided in [cluster.decide(early), cluster.decide(late)]:
            for action in decided.actions:
                cluster.execute(action)
    else:
        for name in replanned:
            cluster.reconcile(Ref("RLRun", "ns", name))
    _apart(cluster)
    cluster.converge()
    assert _with_job(cluster) == ["early"]


@given(runs=RUNS, order=st.randoms(use_true_random=False))
def test_the_earlier_run_goes_first_whoever_is_planned_first(runs: list[Any], order: Any) -> None:
    bodies = [run(f"r{i}", groups=g, created=t) for i, (g, t) in enumerate(runs)]
    cluster = _ready(*bodies)
    for _ in range(12):
        refs = cluster.refs("RLRun")
        order.shuffle(refs)
        for ref in refs:
            cluster.reconcile(ref)
    key = {b["metadata"]["name"]: (b["metadata"]["creationTimestamp"], b["metadata"]["name"]) for b in bodies}
    expected = [
        b["metadata"]["name"]
        for b in bodies
        if not any(
            key[o["metadata"]["name"]] < key[b["metadata"]["name"]] and _members(o) & _members(b) for o in bodies
        )
    ]
    assert _with_job(cluster) == sorted(expected)


@given(runs=RUNS)
def test_every_run_gets_its_turn(runs: list[Any]) -> None:
    _all_get_their_turn(_ready(*(run(f"r{i}", groups=g, created=t) for i, (g, t) in enumerate(runs))))


def test_a_waiting_run_names_the_holder_and_starts_when_it_ends() -> None:
    cluster = _ready(run("first", groups=[train(range={"first": 0, "count": 8})]))
    cluster.converge()
    cluster.add(run("second", groups=[train(names=["g-0007"])]))
    cluster.converge()
    waiting = cluster.raw("RLRun", "second")["status"]
    assert waiting["phase"] == "Waiting"
    assert waiting["conditions"][0]["reason"] == "MembersBusy"
    assert waiting["conditions"][0]["message"] == 'members of group g are held by RLRun "first"'
    cluster.finish("first", succeed=False)
    cluster.converge()
    assert cluster.raw("RLRun", "second")["status"]["phase"] == "Training"


def test_a_deleted_run_keeps_its_members_until_its_driver_is_gone() -> None:
    cluster = _ready(run("first"))
    cluster.converge()
    cluster.add(run("second"))
    cluster.delete("RLRun", "first")
    first, second = Ref("RLRun", "ns", "first"), Ref("RLRun", "ns", "second")
    job = next(r for r in cluster.refs("Job") if r.name.startswith("first-"))
    cluster.raw("Job", job.name)["metadata"]["finalizers"] = ["foregroundDeletion"]
    for _ in range(3):
        cluster.reconcile(first)
        cluster.reconcile(second)
        assert "first" in [r.name for r in cluster.refs("RLRun")]
        assert _with_job(cluster) == ["first"]
    cluster.raw("Job", job.name)["metadata"]["finalizers"] = []
    cluster.controllers()
    cluster.converge()
    assert _with_job(cluster) == ["second"]
    assert first not in cluster.refs("RLRun")


def test_an_earlier_run_that_cannot_start_does_not_block() -> None:
    cluster = _ready(
        run("early", poolRef="absent", created="2026-01-01T00:00:00Z"), run("late", created="2026-01-01T00:00:09Z")
    )
    cluster.converge()
    assert _with_job(cluster) == ["late"]
    assert cluster.raw("RLRun", "early")["status"]["conditions"][0]["reason"] == "PoolMissing"


def test_a_suspended_run_holds_its_members_once_it_has_started() -> None:
    cluster = _ready(run("first"))
    cluster.converge()
    cluster.edit("RLRun", "first", {"spec": {"suspend": True}})
    cluster.add(run("second"))
    cluster.converge()
    assert cluster.raw("RLRun", "first")["status"]["phase"] == "Suspended"
    assert cluster.raw("RLRun", "second")["status"]["conditions"][0]["reason"] == "MembersBusy"


def test_a_run_suspended_from_the_start_holds_nothing() -> None:
    cluster = _ready(run("first", suspend=True), run("second"))
    cluster.converge()
    assert _with_job(cluster) == ["second"]
    assert cluster.raw("RLRun", "first")["status"]["phase"] == "Suspended"


def test_a_manifests_members_by_index_and_by_name_are_taken_to_overlap() -> None:
    listed = population(groups=[{"name": "g", "members": {"manifest": {"configMap": "m"}}}])
    shape = AdapterPopulationSpec.model_validate(listed["spec"])

    def parts(**select: Any) -> list[selection.Part]:
        return selection.parts(RLRunSpec.model_validate(run(groups=[train(**select)])["spec"]), shape)

    assert selection.overlap(parts(range={"first": 0, "count": 1}), parts(names=["ann"])) == "g"
    assert selection.overlap(parts(names=["bob"]), parts(names=["ann"])) is None
    assert selection.overlap(parts(range={"first": 0, "count": 1}), parts(range={"first": 1, "count": 9})) is None


def test_a_run_with_a_runtime_gets_a_pool_that_sleeps_when_it_is_over_and_goes_with_it() -> None:
    own = run("mine", poolRef=None, runtimeRef="runtime", baseUri="s3://adapters/bases/tiny")
    cluster = _ready(own)
    cluster.converge()
    pool = cluster.raw("BasePool", "mine-pool")
    assert cluster.raw("RLRun", "mine")["status"]["phase"] == "Training"
    assert pool["spec"]["adapters"] == {"maxRank": 8, "targets": ["q_proj", "v_proj"]}
    assert pool["spec"]["trainer"] == {"slots": 16}
    cluster.finish("mine")
    cluster.converge()
    assert cluster.raw("BasePool", "mine-pool")["spec"]["suspend"] is True
    assert cluster.at_rest()
    cluster.delete("RLRun", "mine")
    cluster.converge()
    assert "mine-pool" not in [r.name for r in cluster.refs("BasePool")]


def _doubled(rank: int) -> Obj:
    adapter = {"rank": rank, "targets": ["q_proj"], "init": {"kind": "PiSSA", "baseMode": "Rank2r"}}
    return population(groups=[{"name": "g", "members": {"count": 16}, "adapter": adapter}])


@pytest.mark.parametrize(("rank", "fits"), [(8, True), (16, False)])
def test_the_rank_that_must_fit_a_pool_is_the_one_that_is_stored(rank: int, fits: bool) -> None:
    cluster = Cluster()
    for body in (store(), runtime(), pool(), _doubled(rank), run("mine")):
        cluster.add(body)
    cluster.converge()
    condition = cluster.raw("RLRun", "mine")["status"]["conditions"][0]
    assert (condition["reason"] == "AdapterMismatch") is not fits
    words = 'group g has rank 32 (twice 16, by baseMode Rank2r), BasePool "pool" makes room for at most 16'
    assert (words in condition["message"]) is not fits


def test_a_runs_own_pool_has_room_for_the_rank_that_is_stored() -> None:
    cluster = Cluster()
    own = run("mine", poolRef=None, runtimeRef="runtime", baseUri="s3://adapters/bases/tiny")
    for body in (store(), runtime(), _doubled(32), own):
        cluster.add(body)
    cluster.converge()
    assert cluster.raw("BasePool", "mine-pool")["spec"]["adapters"]["maxRank"] == 64


def test_a_pool_of_that_name_that_is_not_the_runs_is_left_alone() -> None:
    cluster = _ready()
    foreign = {**cluster.raw("BasePool", "pool"), "metadata": {"name": "mine-pool"}}
    cluster.add(foreign)
    cluster.add(run("mine", poolRef=None, runtimeRef="runtime", baseUri="s3://adapters/bases/tiny"))
    cluster.converge()
    condition = cluster.raw("RLRun", "mine")["status"]["conditions"][0]
    assert condition["reason"] == "PoolNameTaken"
    assert "mine-pool" in condition["message"]
