"""Only a pod of a Job that the run owns may report that run, and only the newest driver of it."""

from __future__ import annotations

from typing import Any

import pytest

from allele.protocol.errors import StaleEpoch
from allele.protocol.progress import Progress
from allele_operator.cache import Cache
from allele_operator.planning.model import Options
from allele_operator.progress.caller import Caller, Forbidden, authorise
from allele_operator.progress.reports import Reports


def raw(kind: str, name: str, *, owner: str = "", namespace: str = "team", uid: str = "") -> dict[str, Any]:
    owners = [{"apiVersion": "v1", "kind": "X", "name": "x", "uid": owner}] if owner else []
    head = {"name": name, "namespace": namespace, "uid": uid or name, "resourceVersion": "1"}
    return {"kind": kind, "metadata": head | {"ownerReferences": owners, "labels": {"allele.dev/run": "run"}}}


@pytest.fixture
def world() -> Cache:
    c = Cache(Options(operator_url="http://operator", image="image"), progress=lambda _: None)
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
