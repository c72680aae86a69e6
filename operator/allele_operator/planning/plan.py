"""The two entry points: what to do for one object, and which objects must be planned again when one changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from pydantic import ValidationError

from allele_operator.planning import pool, population, run, runtime, store
from allele_operator.planning.conditions import Found, events, merged
from allele_operator.planning.model import (
    PLANNED,
    POOL_LABEL,
    POPULATION_LABEL,
    RUN_LABEL,
    STORE_LABEL,
    Obj,
    Plan,
    Ref,
    World,
)
from allele_operator.planning.naming import own_pool

_PLANS: dict[str, Callable[[Obj, World, datetime], Plan]] = {
    "AdapterStore": store.plan,
    "AdapterRuntime": runtime.plan,
    "BasePool": pool.plan,
    "AdapterPopulation": population.plan,
    "RLRun": run.plan,
}
_SUMMARY = {
    "AdapterStore": "Reachable",
    "AdapterRuntime": "Valid",
    "BasePool": "Ready",
    "AdapterPopulation": "Ready",
    "RLRun": "Running",
}
"""The condition that sums an object up."""

_LABELS = {
    POOL_LABEL: "BasePool",
    RUN_LABEL: "RLRun",
    STORE_LABEL: "AdapterStore",
    POPULATION_LABEL: "AdapterPopulation",
}
"""Label of a child → whose plan reads it."""


def plan(kind: str, obj: Obj, world: World, now: datetime) -> Plan:
    """Plan one object of a kind in PLANNED. `now` is UTC; only conditions and backoff read it."""
    try:
        return _PLANS[kind](obj, world, now)
    except ValidationError as e:
        return _unreadable(kind, obj, e, now)


def _unreadable(kind: str, obj: Obj, error: ValidationError, now: datetime) -> Plan:
    """An object stored under an older schema, its own or one that it names: told, and left alone."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    found = Found(_SUMMARY[kind], False, "SpecInvalid", f"{error.title}: {where}: {first['msg']}", "Warning")
    kept = [c for c in obj["status"].get("conditions") or () if c["type"] != found.type]
    status = obj["status"] | {"phase": "Invalid", "conditions": [*merged(obj, [found], now), *kept]}
    return Plan(status=status, events=events(obj, [found]))


def dependents(kind: str, obj: Obj, world: World) -> set[Ref]:
    """Objects whose plan reads `obj`, itself excluded; `obj` may be the last state of a deleted object."""
    found = set(_by_label(obj)) if kind not in PLANNED else set(_readers(kind, obj, world))
    return found - {Ref.of(obj)}


def _by_label(obj: Obj) -> Iterator[Ref]:
    labels = obj["metadata"].get("labels") or {}
    for label, kind in _LABELS.items():
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
        yield from (
            Ref("RLRun", namespace, o["name"]) for o in obj["metadata"]["ownerReferences"] if o["kind"] == "RLRun"
        )
    elif kind == "AdapterPopulation":
        yield Ref("AdapterStore", namespace, obj["spec"].get("storeRef", ""))
        yield from (Ref.of(o) for o in naming("RLRun", "populationRef", name))
    elif kind == "RLRun":
        population = obj["spec"].get("populationRef", "")
        yield Ref("AdapterPopulation", namespace, population)
        yield Ref("BasePool", namespace, obj["spec"].get("poolRef") or own_pool(name))
        yield from (Ref.of(o) for o in naming("RLRun", "populationRef", population))
