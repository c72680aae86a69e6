"""The two entry points: what to do for one object, and which objects must be planned again when one changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from allele_operator.planning.model import (
    PLANNED,
    POOL_LABEL,
    RUN_LABEL,
    STORE_LABEL,
    Obj,
    Plan,
    Ref,
    World,
)

_PLANS: dict[str, Callable[[Obj, World, datetime], Plan]] = {}


def plan(kind: str, obj: Obj, world: World, now: datetime) -> Plan:
    """Plan one object of a kind in PLANNED. `now` is UTC; only conditions and backoff read it."""
    planner = _PLANS.get(kind)
    return planner(obj, world, now) if planner else Plan()


def dependents(kind: str, obj: Obj, world: World) -> set[Ref]:
    """Objects whose plan reads `obj`, itself excluded; `obj` may be the last state of a deleted object."""
    found = set(_by_label(obj)) if kind not in PLANNED else set(_readers(kind, obj, world))
    return found - {Ref.of(obj)}


def _by_label(obj: Obj) -> Iterator[Ref]:
    labels = obj["metadata"].get("labels") or {}
    for label, kind in ((POOL_LABEL, "BasePool"), (RUN_LABEL, "RLRun"), (STORE_LABEL, "AdapterStore")):
        if name := labels.get(label):
            yield Ref(kind, obj["metadata"]["namespace"], name)


def _readers(kind: str, obj: Obj, world: World) -> Iterator[Ref]:
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]

    def naming(reader: str, field: str, value: str) -> Iterator[Obj]:
        return (o for o in world.select(reader, namespace) if o["spec"].get(field) == value)

    if kind == "AdapterStore":
        yield from (Ref.of(o) for k in ("BasePool", "AdapterPopulation") for o in naming(k, "storeRef", name))
    elif kind == "AdapterRuntime":
        yield from (Ref.of(o) for k in ("BasePool", "RLRun") for o in naming(k, "runtimeRef", name))
    elif kind == "BasePool":
        yield Ref("AdapterStore", namespace, obj["spec"].get("storeRef", ""))
        yield from (Ref.of(o) for o in naming("RLRun", "poolRef", name))
        yield from (Ref("RLRun", namespace, o["name"]) for o in obj["metadata"]["ownerReferences"] if o["kind"] == "RLRun")
    elif kind == "AdapterPopulation":
        yield Ref("AdapterStore", namespace, obj["spec"].get("storeRef", ""))
        yield from (Ref.of(o) for o in naming("RLRun", "populationRef", name))
    elif kind == "RLRun":
        population = obj["spec"].get("populationRef", "")
        yield Ref("AdapterPopulation", namespace, population)
        yield Ref("BasePool", namespace, obj["spec"].get("poolRef") or own_pool(name))
        yield from (Ref.of(o) for o in naming("RLRun", "populationRef", population))


def own_pool(run: str) -> str:
    """Name of the pool that a run with runtimeRef gets."""
    return f"{run}-pool"
