"""Only a pod of a Job that the run owns may report that run, and only the newest driver of it; so it is with pools."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from allele.protocol.errors import StaleEpoch
from allele.protocol.progress import Progress
from allele.protocol.serving import GatewayReport, GatewayStatus, Tier
from allele_operator.cache import Cache
from allele_operator.planning.gateways import STALE
from allele_operator.planning.model import Options
from allele_operator.progress.caller import Caller, Forbidden, authorise, authorise_gateway
from allele_operator.progress.reports import GatewayReports, Reports


def raw(
    kind: str, name: str, *, owner: str = "", namespace: str = "team", uid: str = "", role: str = ""
) -> dict[str, Any]:
    owners = [{"apiVersion": "v1", "kind": "X", "name": "x", "uid": owner}] if owner else []
    head = {"name": name, "namespace": namespace, "uid": uid or name, "resourceVersion": "1"}
    return {
        "kind": kind,
        "metadata": head | {"ownerReferences": owners, "labels": {"allele.dev/run": "run", "allele.dev/role": role}},
    }


@pytest.fixture
def world() -> Cache:
    c = Cache(Options(operator_url="http://operator", image="image"), progress=lambda _: None, gateways=lambda _: ())
    c.put("RLRun", raw("RLRun", "run"))
    c.put("RLRun", raw("RLRun", "other"))
    c.put("Job", raw("Job", "job", owner="run"))
    c.put("Pod", raw("Pod", "driver", owner="job"))
    c.put("Pod", raw("Pod", "stranger"))
    return c


def report(run: str = "run", *, uid: str = "", namespace: str = "team", epoch: int = 1, step: int = 0) -> Progress:
    return Progress(namespace=namespace, run=run, uid=uid or run, epoch=epoch, phase="Training", step=step, steps=40)


def test_the_runs_own_driver_may(world: Cache) -> None:
    authorise(Caller("team", "driver", "driver"), report(), world)


REFUSED = {
    "a pod with the label but of no Job": (Caller("team", "stranger", "stranger"), report()),
    "a pod that only has the name of the driver": (Caller("team", "driver", "another"), report()),
    "an unknown pod": (Caller("team", "ghost", "ghost"), report()),
    "the driver, for another run": (Caller("team", "driver", "driver"), report("other")),
    "the driver, for a deleted namesake": (Caller("team", "driver", "driver"), report(uid="before")),
    "a pod of another namespace": (Caller("else", "driver", "driver"), report()),
    "the driver, for another namespace": (Caller("team", "driver", "driver"), report(namespace="else")),
}


@pytest.mark.parametrize(("caller", "told"), REFUSED.values(), ids=REFUSED)
def test_nobody_else_may(world: Cache, caller: Caller, told: Progress) -> None:
    with pytest.raises(Forbidden):
        authorise(caller, told, world)


def test_an_old_driver_that_wakes_up_is_refused() -> None:
    reports = Reports()
    assert reports.accept(report(epoch=2, step=5))
    with pytest.raises(StaleEpoch, match="expected epoch 2 or later, found 1"):
        reports.accept(report(epoch=1, step=9))
    newest = reports.get("run")
    assert newest is not None and newest.step == 5


def test_a_repeated_report_is_no_news_and_a_forgotten_run_starts_anew() -> None:
    reports = Reports()
    assert reports.accept(report(epoch=2))
    assert not reports.accept(report(epoch=2))
    reports.forget("run")
    assert reports.get("run") is None and reports.accept(report(epoch=1))


@pytest.fixture
def pools(world: Cache) -> Cache:
    """Two pools, one made of a JobSet, one of Jobs, each with a rollout pod; the first has a trainer too."""
    for pool in ("pool", "jobs"):
        world.put("BasePool", raw("BasePool", pool))
    world.put("JobSet", raw("JobSet", "pool-1", owner="pool"))
    for role in ("rollout", "trainer"):
        world.put("Job", raw("Job", f"pool-{role}", owner="pool-1", role=role))
        world.put("Pod", raw("Pod", f"{role}-0", owner=f"pool-{role}"))
    world.put("Job", raw("Job", "jobs-rollout", owner="jobs", role="rollout"))
    world.put("Pod", raw("Pod", "other-0", owner="jobs-rollout"))
    return world


def gateway(pool: str = "pool", *, namespace: str = "team", adapters: int = 3) -> GatewayReport:
    tier = Tier(name="hot", adapters=adapters, bytes=10, capacity=4)
    status = GatewayStatus(
        replica="r",
        engine="Ready",
        engine_version="1",
        publish_path="Bulk",
        base_digest="d",
        tiers=(tier,),
        populations={},
    )
    return GatewayReport(namespace=namespace, pool=pool, status=status)


def test_a_pools_own_gateways_may(pools: Cache) -> None:
    assert authorise_gateway(Caller("team", "rollout-0", "rollout-0"), gateway(), pools) == "pool"
    assert authorise_gateway(Caller("team", "other-0", "other-0"), gateway("jobs"), pools) == "jobs"


REFUSED_GATEWAYS = {
    "a gateway of another pool": (Caller("team", "other-0", "other-0"), gateway()),
    "the pool's trainer": (Caller("team", "trainer-0", "trainer-0"), gateway()),
    "a driver": (Caller("team", "driver", "driver"), gateway()),
    "a pod of no pool": (Caller("team", "stranger", "stranger"), gateway()),
    "a pod that only has the name": (Caller("team", "rollout-0", "another"), gateway()),
    "a gateway of another namespace": (Caller("else", "rollout-0", "rollout-0"), gateway()),
    "for a pool that is not there": (Caller("team", "rollout-0", "rollout-0"), gateway("ghost")),
    "for another namespace": (Caller("team", "rollout-0", "rollout-0"), gateway(namespace="else")),
}


@pytest.mark.parametrize(("caller", "told"), REFUSED_GATEWAYS.values(), ids=REFUSED_GATEWAYS)
def test_nobody_else_may_tell_of_a_pool(pools: Cache, caller: Caller, told: GatewayReport) -> None:
    with pytest.raises(Forbidden):
        authorise_gateway(caller, told, pools)


def test_a_gateway_with_the_same_to_say_is_no_news_but_is_still_there() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    reports = GatewayReports(now=lambda: now)
    assert reports.accept("pool", "a", gateway().status)
    assert reports.accept("pool", "b", gateway().status)
    now += timedelta(seconds=10)
    assert not reports.accept("pool", "a", gateway().status)
    assert {s.pod_uid: s.at for s in reports.of("pool")} == {"a": now, "b": now - timedelta(seconds=10)}
    assert reports.accept("pool", "a", gateway(adapters=4).status)
    now += STALE
    assert reports.accept("pool", "a", gateway(adapters=4).status), "it was counted out meanwhile"
    reports.forget("a")
    assert [s.pod_uid for s in reports.of("pool")] == ["b"]
    reports.forget("pool")
    assert not reports.of("pool")
