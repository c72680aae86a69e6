"""A pool's status sums what its gateways said of late: those that are gone or silent do not count."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from allele.protocol.serving import GatewayStatus, Tier
from allele_operator.planning.gateways import STALE, summed
from allele_operator.planning.model import GatewaySeen, Obj, Ref
from tests.planning.cluster import START, Cluster
from tests.planning.resources import demo

POOL: Obj = {"metadata": {"name": "pool", "generation": 1}, "status": {}}
Path = Literal["Bulk", "Native"]


def status(replica: str = "r", *, path: Path = "Bulk", why: str = "", adapters: int = 2, **more: Any) -> GatewayStatus:
    return GatewayStatus(
        **{  # type: ignore[arg-type]
            "replica": replica,
            "engine": "Ready",
            "engine_version": "1",
            "publish_path": path,
            "publish_path_message": why,
            "base_digest": "d",
            "tiers": (
                Tier(name="hot", adapters=adapters, bytes=100 * adapters, capacity=4),
                Tier(name="disk", adapters=9, bytes=900, capacity=1000),
            ),
            "populations": {},
            **more,
        }
    )


def seen(pod: str, found: GatewayStatus, *, seconds_ago: float = 0) -> GatewaySeen:
    return GatewaySeen(pod, START - timedelta(seconds=seconds_ago), found)


def test_tiers_and_engines_are_summed() -> None:
    two = [seen("a", status("a")), seen("b", status("b", adapters=4, engine="Starting"))]
    found = summed(POOL, two, {"a", "b"}, listening=START, now=START)
    assert found.status == {
        "engines": {"ready": 1, "starting": 1, "failed": 0},
        "tiers": [
            {"name": "hot", "adapters": 6, "bytes": 600, "capacity": 8},
            {"name": "disk", "adapters": 18, "bytes": 1800, "capacity": 2000},
        ],
        "publishPath": "Bulk",
    }
    (bulk,) = found.conditions
    assert (bulk.type, bulk.status, bulk.reason) == ("BulkPublishing", True, "Bulk")


def test_a_gateway_whose_engine_has_not_started_says_nothing_of_its_path() -> None:
    starting = seen("b", status("b", path="Native", engine="Starting"))
    found = summed(POOL, [seen("a", status("a")), starting], {"a", "b"}, listening=START, now=START)
    assert found.status["publishPath"] == "Bulk" and found.status["engines"]["starting"] == 1
    assert [c.reason for c in found.conditions] == ["Bulk"]
    alone = summed(POOL, [starting], {"a", "b"}, listening=START, now=START)
    assert "publishPath" not in alone.status and not alone.conditions
    again = summed(POOL | {"status": found.status}, [starting], {"a", "b"}, listening=START, now=START)
    assert again.status["publishPath"] == "Bulk", "it starts again"


def test_replicas_that_differ_are_named_with_their_reason() -> None:
    native = [seen(n, status(n, path="Native", why=f"no shared memory on {n}")) for n in "bcde"]
    found = summed(POOL, [seen("a", status("a")), *native], set("abcde"), listening=START, now=START)
    assert found.status["publishPath"] == "Mixed"
    (bulk,) = found.conditions
    assert (bulk.status, bulk.reason, bulk.severity) == (False, "Mixed", "Warning")
    assert "4 of 5 gateways" in bulk.message and "b: no shared memory on b" in bulk.message
    assert "and 2 more" in bulk.message and "on e" not in bulk.message


NAMES = st.sampled_from("abcdef")


@given(st.lists(st.tuples(NAMES, st.floats(0, 100)), unique_by=lambda t: t[0]), st.sets(NAMES))
def test_only_fresh_reports_of_pods_that_are_there_count(ages: list[tuple[str, float]], pods: set[str]) -> None:
    reports = [seen(pod, status(pod), seconds_ago=age) for pod, age in ages]
    found = summed(POOL, reports, pods, listening=START - 2 * STALE, now=START)
    fresh = {pod: age for pod, age in ages if pod in pods and age < STALE.total_seconds()}
    if not fresh:
        assert not found.status and not found.conditions and found.requeue is None
        return
    assert found.status["engines"]["ready"] == len(fresh)
    assert found.status["tiers"][0]["adapters"] == 2 * len(fresh)
    assert found.requeue is not None and 0 < found.requeue <= STALE.total_seconds() - max(fresh.values()) + 1e-3


def test_an_operator_that_has_just_started_leaves_what_is_there_until_gateways_had_time_to_speak() -> None:
    pool = POOL | {"status": summed(POOL, [seen("a", status())], {"a"}, listening=START, now=START).status}
    early = summed(pool, [], {"a"}, listening=START, now=START + STALE / 2)
    assert early.status == pool["status"] and early.requeue == STALE.total_seconds() / 2
    assert not summed(pool, [], {"a"}, listening=START, now=START + STALE).status
    assert not summed(pool, [], set(), listening=START, now=START + STALE / 2).status, "its pods are gone"


def test_a_scaled_down_pool_forgets_its_last_replica_at_once_and_a_silent_one_after_a_while() -> None:
    cluster = demo(Cluster())
    cluster.edit("BasePool", "pool", {"spec": {"rollout": {"replicas": 2}}})
    cluster.converge()
    uid = cluster.raw("BasePool", "pool")["metadata"]["uid"]
    pods = [r.name for r in cluster.refs("Pod") if "rollout" in r.name]
    uids = [cluster.raw("Pod", name)["metadata"]["uid"] for name in pods]
    cluster.seen[uid] = [GatewaySeen(u, cluster.now, status(u)) for u in uids]

    def adapters() -> int | None:
        cluster.converge()
        tiers = cluster.raw("BasePool", "pool")["status"].get("tiers")
        return tiers[0]["adapters"] if tiers else None

    assert adapters() == 4
    assert cluster.decide(Ref("BasePool", "ns", "pool")).requeue, "it looks again when they are due"
    cluster.remove("Pod", pods[0])
    assert cluster.reconcile(Ref("BasePool", "ns", "pool"))
    assert cluster.raw("BasePool", "pool")["status"]["tiers"][0]["adapters"] == 2
    cluster.now += STALE
    assert adapters() is None


def test_an_operator_that_is_reached_elsewhere_now_replaces_no_pods() -> None:
    cluster = demo(Cluster())
    cluster.converge()
    cluster.options = dataclasses.replace(cluster.options, operator_url="http://elsewhere:8080")
    assert cluster.at_rest()
