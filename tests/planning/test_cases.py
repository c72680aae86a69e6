"""YAML in, YAML out: a world, what is different in it, and what the plan of one object says.

The world is the converged one of `resources.demo` with a run in it, or, with `fresh`, the same before anything was
reconciled. With `ending` the namespace is being deleted. Names may hold `*`, since some end in a hash. Messages are
compared by what they contain.
"""

from __future__ import annotations

import copy
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from allele.protocol.progress import Progress
from allele_operator.planning.model import Action, Apply, Create, Delete, Obj, Patch, Ref
from tests.planning.cluster import Cluster
from tests.planning.resources import demo, run

FOLDER = Path(__file__).parent / "cases"
CASES = [(f.stem, case) for f in sorted(FOLDER.glob("*.yaml")) for case in yaml.safe_load(f.read_text())]


def _world(case: Obj) -> Cluster:
    cluster = demo(Cluster(), run())
    if not case.get("fresh"):
        cluster.converge()
    for pattern in case.get("without", ()):
        for ref in _match(cluster, pattern):
            cluster.remove(ref.kind, ref.name)
    for body in copy.deepcopy(case.get("add", ())):
        cluster.add(body)
    for pattern, change in case.get("change", {}).items():
        for ref in _match(cluster, pattern):
            cluster.edit(ref.kind, ref.name, change)
    if report := case.get("progress"):
        text = {"message": "x" * 1024} if report.get("message") == "LONG" else {}
        uid = cluster.raw("RLRun", "run")["metadata"]["uid"]
        cluster.reports[uid] = Progress(namespace="ns", run="run", uid=uid, epoch=1, **(report | text))
    cluster.ending = case.get("ending", False)
    if now := case.get("now"):
        cluster.now = datetime.fromisoformat(now)
    return cluster


def _match(cluster: Cluster, pattern: str) -> list[Ref]:
    kind, name = pattern.split("/")
    found = [r for r in cluster.refs(kind) if fnmatch(r.name, name)]
    assert found, f"{pattern} is not in the world"
    return found


def _word(action: Action) -> str:
    match action:
        case Apply(body) | Create(body):
            return f"{type(action).__name__} {body['kind']}"
        case Delete(ref) | Patch(ref):
            return f"{type(action).__name__} {ref.kind}"
    return type(action).__name__


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{k}: {c['name']}" for k, c in CASES])
def test_case(kind: str, case: Obj) -> None:
    cluster, expect = _world(case), case["expect"]
    target = Ref(case["plan"].split("/")[0], "ns", case["plan"].split("/")[1])
    decided = cluster.decide(target)
    status: Any = decided.status
    conditions = {c["type"]: c for c in (status or {}).get("conditions", ())}
    for type_, (value, reason, text) in expect.get("conditions", {}).items():
        found = conditions[type_]
        assert (found["status"], found["reason"]) == (value, reason), found
        assert text in found["message"]
    if "status" in expect:
        assert expect["status"] == ({k: status.get(k) for k in expect["status"]} if expect["status"] else status)
    if "actions" in expect:
        assert [_word(a) for a in decided.actions] == expect["actions"]
    if "events" in expect:
        assert [f"{e.type} {e.reason}" for e in decided.events] == expect["events"]
    if "requeue" in expect:
        assert decided.requeue == expect["requeue"]
    if "longest" in expect:
        assert max(len(c["message"]) for c in conditions.values()) == expect["longest"]
