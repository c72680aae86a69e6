"""BasePool: Services and one workload, made once when all it names is there, replaced when its template changed.

The old workload goes before the new one comes, since both would want the same accelerators, and it does not go while a
run trains in it. What can change in place (suspend, rollouts) does.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from allele.api.pool import BasePoolSpec
from allele.api.run import RLRunSpec
from allele.api.runtime import AdapterRuntimeSpec
from allele.api.store import AdapterStoreSpec
from allele.protocol.progress import TrainerSlots
from allele_operator.planning import admission, naming, observe, selection
from allele_operator.planning.admission import lookup, missing, store_obstacle
from allele_operator.planning.conditions import Found, Trouble, parse
from allele_operator.planning.model import (
    POOL_LABEL,
    ROLE_LABEL,
    Action,
    Apply,
    Create,
    Delete,
    Obj,
    Patch,
    Plan,
    Ref,
    World,
)
from allele_operator.planning.pool_status import PoolView, conclude, ended
from allele_operator.planning.render import pool as render
from allele_operator.planning.render.access import StoreAccess

FAILED_PAUSE = timedelta(seconds=60)
"""From the failure of a workload to the next one."""


def plan(pool: Obj, world: World, now: datetime) -> Plan:
    if observe.deleting(pool):
        return Plan()  # the garbage collector takes what it owns
    spec = BasePoolSpec.model_validate(pool["spec"])
    parts = inputs(pool, spec, world)
    current = _current(pool, world)
    training = [r for r in world.select("RLRun", pool["metadata"]["namespace"]) if _trains(r, pool, world)]
    if isinstance(parts, Trouble):
        actions: list[Action] = []
        up_to_date = parts.of("UpToDate")
        job_set = _stem(current)
    else:
        actions = _apply_services(pool, parts, world)
        hashed, wanted = render.workloads(pool, parts, world.options)
        more, up_to_date = _replace(pool, spec, wanted, current, hashed=hashed, training=training)
        actions += more
        job_set = f"{parts.name}-{hashed}" if not current else _stem(current)
    kept = [w for w in current if not observe.deleting(w)]
    actions += _adjust(pool, spec, kept, world, gone={a.uid for a in actions if isinstance(a, Delete)})
    failed, requeue = _failed(kept, now)
    actions += failed
    view = PoolView(
        spec=spec,
        inputs=parts if isinstance(parts, Trouble) else None,
        workloads=kept,
        pods=_pods(kept, world),
        queued=naming.queued(pool),
        up_to_date=up_to_date,
        job_set=job_set,
        runs=len(training),
        used=sum(_slots_of(r, world) for r in training),
        trainer=_told(training, world),
        gateways=world.gateways(pool["metadata"]["uid"]),
        listening=world.listening,
    )
    status, events, stale = conclude(pool, view, options=world.options, now=now)
    waits = [s for s in (requeue, stale) if s is not None]
    return Plan(actions=tuple(_once(actions)), status=status, events=events, requeue=min(waits, default=None))


def inputs(pool: Obj, spec: BasePoolSpec, world: World) -> render.PoolParts | Trouble:
    """What the pods are made from, or what the pool waits for."""
    name, namespace = pool["metadata"]["name"], pool["metadata"]["namespace"]
    runtime = lookup(world, pool, "AdapterRuntime", spec.runtime_ref)
    if runtime is None:
        return missing("AdapterRuntime", spec.runtime_ref, namespace, "RuntimeMissing")
    if observe.condition(runtime, "Valid").get("status") == "False":
        why = observe.condition(runtime, "Valid")["message"]
        return Trouble("RuntimeInvalid", f'AdapterRuntime "{spec.runtime_ref}" is not valid: {why}')
    store = lookup(world, pool, "AdapterStore", spec.store_ref)
    obstacle = store_obstacle(pool, spec.store_ref, world)
    if store is None or (obstacle and not _current(pool, world)):  # a running pool outlives an outage
        return obstacle or missing("AdapterStore", spec.store_ref, namespace, "StoreMissing")
    return render.PoolParts(
        name=name,
        namespace=namespace,
        spec=spec,
        runtime=AdapterRuntimeSpec.model_validate(runtime["spec"]),
        store=StoreAccess.of(AdapterStoreSpec.model_validate(store["spec"])),
        report_url=world.options.operator_url,
        trainer_url=naming.trainer_url(name, namespace, world.options),
    )


def _current(pool: Obj, world: World) -> list[Obj]:
    return world.owned(pool["metadata"]["uid"], world.options.backend)


def _stem(workloads: list[Obj]) -> str:
    """Pool name with template hash, the JobSet's name."""
    for w in workloads:
        labels = w["metadata"]["labels"]
        return f"{labels[POOL_LABEL]}-{labels[render.TEMPLATE_LABEL]}"
    return ""


def _trains(run: Obj, pool: Obj, world: World) -> bool:
    return admission.pool_name(run) == pool["metadata"]["name"] and admission.holds(run, world)


def _told(training: list[Obj], world: World) -> TrainerSlots | None:
    """What runs in the pool report of its trainer; one that reported from a trainer before is overruled by its next."""
    reports = [world.progress(r["metadata"]["uid"]) for r in training]
    return next((r.trainer for r in reports if r is not None and r.trainer is not None), None)


def _slots_of(run: Obj, world: World) -> int:
    """Training slots that the run fills: its members, or its cohort where that is smaller."""
    members: int = run["status"].get("members", 0)
    if not members:
        found = admission.population_of(run, world)
        if not isinstance(found, Trouble):
            members = selection.size(RLRunSpec.model_validate(run["spec"]), found[1]) or 0
    cohort = run["spec"].get("pace", {}).get("cohort")
    return min(members, cohort) if cohort else members


def _apply_services(pool: Obj, parts: render.PoolParts, world: World) -> list[Action]:
    return [Apply(s) for s in render.services(pool, parts) if not naming.as_applied(world.get(Ref.of(s)), s)]


def _replace(
    pool: Obj, spec: BasePoolSpec, wanted: list[Obj], current: list[Obj], *, hashed: str, training: list[Obj]
) -> tuple[list[Action], Found]:
    """Delete what has another template, then create what is missing."""
    stale = [w for w in current if w["metadata"]["labels"].get(render.TEMPLATE_LABEL) != hashed]
    if stale and training:
        names = ", ".join(sorted(r["metadata"]["name"] for r in training))
        return [], Found("UpToDate", False, "RunsTraining", f"the pods are replaced when these runs end: {names}")
    if stale:
        going: list[Action] = [Delete(Ref.of(w), w["metadata"]["uid"]) for w in stale if not observe.deleting(w)]
        return going, Found("UpToDate", False, "Replacing", "the old pods go before new ones are made")
    if naming.queued(pool) and spec.suspend:
        off: list[Action] = [Delete(Ref.of(w), w["metadata"]["uid"]) for w in current if not observe.deleting(w)]
        return off, Found("UpToDate", True, "UpToDate", "suspended: nothing is queued")
    have = {w["metadata"]["name"] for w in current}
    new: list[Action] = [Create(w) for w in wanted if w["metadata"]["name"] not in have]
    return new, Found("UpToDate", True, "UpToDate", "the pods are made from the present spec and runtime")


def _adjust(pool: Obj, spec: BasePoolSpec, workloads: list[Obj], world: World, *, gone: set[str]) -> list[Action]:
    """Suspend and scale in place; with a queue both are Kueue's."""
    if naming.queued(pool):
        return []
    out: list[Action] = []
    for workload in workloads:
        uid = workload["metadata"]["uid"]
        if uid in gone or ended(workload):
            continue
        if workload["spec"]["suspend"] != spec.suspend:
            out.append(Patch(Ref.of(workload), uid, {"spec": {"suspend": spec.suspend}}))
        for job in _jobs(workload, world):
            replicas = spec.rollout.replicas
            if job["metadata"]["labels"].get(ROLE_LABEL) == "rollout" and job["spec"]["parallelism"] != replicas:
                # completions may only change together with parallelism, and 0 would make the Job complete
                scale = {"parallelism": 0} if replicas == 0 else render.job_scale(replicas)
                out.append(Patch(Ref.of(job), job["metadata"]["uid"], {"spec": scale}))
    return out


def _jobs(workload: Obj, world: World) -> list[Obj]:
    """Jobs of a workload: itself with the Job backend."""
    if workload["kind"] == "Job":
        return [workload]
    return [j for j in world.owned(workload["metadata"]["uid"], "Job") if not observe.deleting(j)]


def _pods(workloads: list[Obj], world: World) -> list[Obj]:
    return [p for w in workloads for j in _jobs(w, world) for p in world.owned(j["metadata"]["uid"], "Pod")]


def _failed(workloads: list[Obj], now: datetime) -> tuple[list[Action], float | None]:
    """A workload that gave up, or ended though it should not, is made anew after a pause."""
    failures = [(w, f) for w in workloads if (f := ended(w))]
    if not failures:
        return [], None
    left = max(parse(f["lastTransitionTime"]) for _, f in failures) + FAILED_PAUSE - now
    if left > timedelta(0):
        return [], left.total_seconds()
    return [Delete(Ref.of(w), w["metadata"]["uid"]) for w, _ in failures], None


def _once(actions: list[Action]) -> list[Action]:
    """Without a second deletion of the same object."""
    out: list[Action] = []
    for action in actions:
        if not (isinstance(action, Delete) and action in out):
            out.append(action)
    return out
