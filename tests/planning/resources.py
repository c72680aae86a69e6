"""A store, a runtime, a pool, a population and a run that go together, as the API server stores them."""

from __future__ import annotations

from typing import Any

from allele_operator.planning.model import Obj
from tests.planning.cluster import Cluster

DIGEST = "sha256:" + "a" * 64
IMAGES = {"trainer": "trainer:1", "engine": "engine:1", "gateway": "gateway:1", "driver": "driver:1"}


def resource(kind: str, name: str, spec: Obj, **metadata: Any) -> Obj:
    head = {"name": name, "namespace": "ns"} | metadata
    return {"apiVersion": "allele.dev/v1alpha1", "kind": kind, "metadata": head, "spec": spec}


def store(**spec: Any) -> Obj:
    base = {
        "bucket": "adapters",
        "prefix": "demo",
        "endpoint": "http://s3.s3:7070",
        "region": "us-east-1",
        "credentials": {"secretName": "s3"},
    }
    return resource("AdapterStore", "store", base | spec)


def runtime(**spec: Any) -> Obj:
    return resource("AdapterRuntime", "runtime", {"images": IMAGES} | spec)


def pool(*, name: str = "pool", labels: Obj | None = None, **spec: Any) -> Obj:
    base = {
        "base": {"uri": "s3://adapters/bases/tiny", "digest": DIGEST},
        "runtimeRef": "runtime",
        "storeRef": "store",
        "adapters": {"maxRank": 16, "targets": ["q_proj", "v_proj"]},
        "trainer": {"slots": 16},
        "rollout": {"replicas": 1, "slots": 16},
        "suspend": False,
    }
    return resource("BasePool", name, {k: v for k, v in (base | spec).items() if v is not None}, labels=labels or {})


def population(**spec: Any) -> Obj:
    groups = [{"name": "g", "members": {"count": 16}, "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]}}]
    return resource(
        "AdapterPopulation", "pop", {"base": {"digest": DIGEST}, "storeRef": "store", "groups": groups} | spec
    )


def train(**select: Any) -> Obj:
    return {
        "select": {"group": "g"} | select,
        "environment": {"path": "task:Environment"},
        "optimizer": {"learningRate": 0.001},
    }


def run(
    name: str = "run", *, labels: Obj | None = None, created: str | None = None, uid: str | None = None, **spec: Any
) -> Obj:
    base = {"populationRef": "pop", "poolRef": "pool", "groups": [train()], "stop": {"steps": 40}, "suspend": False}
    given = {"creationTimestamp": created, "uid": uid}
    metadata = {"labels": labels or {}} | {k: v for k, v in given.items() if v}
    return resource("RLRun", name, {k: v for k, v in (base | spec).items() if v is not None}, **metadata)


def demo(cluster: Cluster, *more: Obj) -> Cluster:
    """All but the run, and what more is given."""
    for body in (store(), runtime(), pool(), population(), *more):
        cluster.add(body)
    return cluster
