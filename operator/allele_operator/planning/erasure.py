"""Deletion of a population whose spec says so: its folder in the store is erased, then the object goes.

    deleted ─► no run holds members ─► no pass collects ─► store reachable ─► erase Job ─► Erased ─► finalizer dropped
                   └── RunsActive ───── CollectionActive ──── StoreMissing … ──── failed: again after a while

Until then condition Erased says what it waits for, and with deletionPolicy Retain the object goes at once. In a
namespace that is being deleted no Job can be made: the bytes stay, and an event says where.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import ValidationError

from allele.api.store import AdapterStoreSpec
from allele.protocol.upkeep import ErasureReport
from allele_operator.planning import jobs, observe, pods
from allele_operator.planning.admission import holds, lookup, order, store_obstacle
from allele_operator.planning.conditions import Found, Trouble, events, merged
from allele_operator.planning.model import (
    ERASE_FINALIZER,
    Action,
    AddFinalizer,
    Create,
    Delete,
    DropFinalizer,
    Event,
    Obj,
    Plan,
    Ref,
    World,
)
from allele_operator.planning.render.upkeep import erase_job, folder

_ENDING = "NamespaceTerminating"
_LOOK_AGAIN_SECONDS = 60.0
"""Nothing tells that a namespace has begun to end; then nothing is to be waited for any longer."""
_NO_RESULT = ("RunsActive", "CollectionActive", "StoreMissing", "StoreDeleting", "StoreUnreachable", "Erasing")
"""Reasons of Erased that no Job gave."""
_LETTING_GO = "with spec.deletionPolicy Retain the population goes now and its bytes stay"
_GARBAGE_COLLECTED = ("foregroundDeletion", "orphan")
"""Finalizers of Kubernetes' own: while one stands, a Job made for this owner would be deleted, or orphaned, at once."""


def finalizer(population: Obj) -> AddFinalizer | DropFinalizer | None:
    """What brings the finalizer in line with the policy, before the population is deleted."""
    held = ERASE_FINALIZER in population["metadata"]["finalizers"]
    if (population["spec"].get("deletionPolicy") == "Delete") == held:
        return None
    return _drop(population) if held else AddFinalizer(Ref.of(population), _uid(population), ERASE_FINALIZER)


def plan(population: Obj, world: World, now: datetime) -> Plan:
    """`population` is being deleted. Its spec is read field by field: one that is no longer valid must go as well."""
    if ERASE_FINALIZER not in population["metadata"]["finalizers"]:
        return Plan()
    known = observe.condition(population, "Erased")
    if population["spec"].get("deletionPolicy") != "Delete" or known.get("status") == "True":
        return Plan((_drop(population),))
    if world.ends(population["metadata"]["namespace"]):
        return Plan((_drop(population),)) if known.get("reason") == _ENDING else _left(population, world, now)
    actions, dependents = _dependents(population, world)
    if obstacle := _runs(population, world) or dependents or _store(population, world):
        return _told(population, obstacle, now, actions=actions, requeue=_LOOK_AGAIN_SECONDS)
    store = lookup(world, population, "AdapterStore", population["spec"]["storeRef"])
    assert store is not None, "store_obstacle has seen it"
    return _erase(population, AdapterStoreSpec.model_validate(store["spec"]), world, now)


def _runs(population: Obj, world: World) -> Found | None:
    name, namespace = population["metadata"]["name"], population["metadata"]["namespace"]
    runs = sorted((r for r in world.select("RLRun", namespace) if r["spec"].get("populationRef") == name), key=order)
    active = [r["metadata"]["name"] for r in runs if holds(r, world)]
    if not active:
        return None
    some = ", ".join(active[:5]) + (f" and {len(active) - 5} more" if len(active) > 5 else "")
    text = f"waits until RLRun {some} has ended: let it end, or delete it; {_LETTING_GO}"
    return Found("Erased", False, "RunsActive", text)


def _dependents(population: Obj, world: World) -> tuple[list[Action], Found | None]:
    """A pass of collection beside the erasure would write into what is gone: the CronJob goes first, with its pods."""
    there = world.owned(_uid(population), "CronJob")
    actions: list[Action] = [Delete(Ref.of(c), c["metadata"]["uid"]) for c in there if not observe.deleting(c)]
    waiting = [f'CronJob "{c["metadata"]["name"]}"' for c in there]
    if set(_GARBAGE_COLLECTED) & set(population["metadata"]["finalizers"]):
        waiting.append("Kubernetes' garbage collector")
    if not waiting:
        return actions, None
    return actions, Found("Erased", False, "CollectionActive", f"waits for {' and '.join(waiting)} to be done")


def _store(population: Obj, world: World) -> Found | None:
    name = population["spec"]["storeRef"]
    trouble = store_obstacle(population, name, world)
    store = lookup(world, population, "AdapterStore", name)
    if store is not None and observe.deleting(store):
        trouble = Trouble("StoreDeleting", f'AdapterStore "{name}" is being deleted')
    if trouble is None:
        return None
    return Found("Erased", False, trouble.reason, f"{trouble.message}; {_LETTING_GO}", trouble.severity)


def _erase(population: Obj, store: AdapterStoreSpec, world: World, now: datetime) -> Plan:
    """One Job after the other, until one has erased all. It is made anew when the store's address or access changes."""
    wanted, attempts = erase_job(population, store, world.options), world.owned(_uid(population), "Job")
    job = next((j for j in attempts if j["metadata"]["name"] == wanted["metadata"]["name"]), None)
    actions: list[Action] = [_delete(j) for j in attempts if j is not job and not observe.deleting(j)]
    found = _failed_before(population) or Found(
        "Erased", False, "Erasing", f"Job {wanted['metadata']['name']} erases {folder(population, store)}"
    )
    wait: timedelta | None = None
    if not attempts:
        actions.append(Create(wanted))
    elif job is not None and not observe.deleting(job):
        if end := jobs.ended(job):
            found = _result(job, end, world)
            if not found.status:
                wait = jobs.again(population, "Erased", end) - now
                if wait <= timedelta(0):
                    actions, wait = [*actions, _delete(job)], None
        elif trouble := pods.trouble(world.owned(job["metadata"]["uid"], "Pod")):
            found = Found("Erased", False, trouble.reason, f"{trouble.message}; {_LETTING_GO}", "Warning")
    requeue = _LOOK_AGAIN_SECONDS if wait is None else wait.total_seconds()
    return _told(population, found, now, actions=actions, requeue=requeue)


def _result(job: Obj, end: Obj, world: World) -> Found:
    try:
        report = ErasureReport.model_validate(jobs.report(job, world))
    except ValidationError:  # no pod is left, or none got that far
        if end["type"] == "Complete":
            return Found("Erased", True, "Erased", f"Job {job['metadata']['name']} completed")
        trouble = pods.trouble(world.owned(job["metadata"]["uid"], "Pod"))
        trouble = trouble or Trouble("EraseFailed", end.get("message") or f"Job {job['metadata']['name']} failed")
        return Found("Erased", False, trouble.reason, f"{trouble.message}; {_LETTING_GO}", "Warning")
    if report.erased:
        return Found("Erased", True, report.reason, report.message)
    return Found("Erased", False, report.reason, f"{report.message}; {_LETTING_GO}", "Warning")


def _failed_before(population: Obj) -> Found | None:
    """Why the last attempt failed stays told while the next one is at it."""
    old = observe.condition(population, "Erased")
    if not old or old["reason"] in _NO_RESULT:
        return None
    return Found("Erased", False, old["reason"], old["message"], "Warning")


def _left(population: Obj, world: World, now: datetime) -> Plan:
    """The namespace goes: what is in the store outlives it."""
    name, namespace = population["metadata"]["name"], population["metadata"]["namespace"]
    store = lookup(world, population, "AdapterStore", population["spec"]["storeRef"])
    url = population["status"].get("url") or (
        folder(population, AdapterStoreSpec.model_validate(store["spec"])) if store else ""
    )
    where = url or f'{namespace}/{name} in what AdapterStore "{population["spec"]["storeRef"]}" was'
    root = url.removesuffix(f"/{namespace}/{name}") or "URL"
    text = (
        f"AdapterPopulation {namespace}/{name}: its namespace is being deleted and takes no Job that could erase "
        f"{where}: the bytes stay; `allele populations --namespace {namespace} --store {root}` lists them"
    )
    told = _told(population, Found("Erased", False, _ENDING, text, "Warning"), now)
    return Plan(status=told.status, events=(Event("Warning", _ENDING, text, outlives=True),))


def _told(
    population: Obj, found: Found, now: datetime, *, actions: list[Action] | None = None, requeue: float | None = None
) -> Plan:
    """Ready says the same, since it is what `kubectl get` shows."""
    conditions = [Found("Ready", False, found.reason, found.message, found.severity), found]
    status = population["status"] | {
        "observedGeneration": population["metadata"].get("generation", 0),
        "phase": "Deleting",
        "conditions": merged(population, conditions, now),
    }
    over = found.status is True
    return Plan(tuple(actions or ()), status, events(population, [found]), requeue=None if over else requeue)


def _delete(job: Obj) -> Delete:
    return Delete(Ref.of(job), job["metadata"]["uid"])


def _drop(population: Obj) -> DropFinalizer:
    return DropFinalizer(Ref.of(population), _uid(population), ERASE_FINALIZER)


def _uid(population: Obj) -> str:
    uid: str = population["metadata"]["uid"]
    return uid
