"""RLRun: waits for what it names and for its members, then one driver Job; its status is what the driver reports."""

from __future__ import annotations

import dataclasses
from datetime import datetime

from allele.api.run import RLRunSpec
from allele.protocol.bundle import RunBundle
from allele_operator.planning import admission, naming, observe
from allele_operator.planning.admission import Busy, Needs
from allele_operator.planning.conditions import Trouble
from allele_operator.planning.jobs import ended
from allele_operator.planning.model import (
    Action,
    AddFinalizer,
    Apply,
    Create,
    Delete,
    DropFinalizer,
    Obj,
    Options,
    Patch,
    Plan,
    Ref,
    World,
)
from allele_operator.planning.own_pool import own_pool
from allele_operator.planning.render import driver as render
from allele_operator.planning.render.access import StoreAccess
from allele_operator.planning.run_status import final, report, running, waiting


def plan(run: Obj, world: World, now: datetime) -> Plan:
    jobs = world.owned(run["metadata"]["uid"], "Job")
    if observe.deleting(run):
        return _release(run, jobs)
    if admission.finished(run):
        return _after(run, world)
    spec = RLRunSpec.model_validate(run["spec"])
    job = next((j for j in jobs if not observe.deleting(j)), None)
    own = _own_pool(run, spec, world, idle=spec.suspend and job is None)
    if job:
        decided = _drive(run, spec, job, world, now)
    else:
        obstacle = own if isinstance(own, Trouble) else None
        decided = _admit(run, spec, world, now, leaving=bool(jobs), obstacle=obstacle)
    if isinstance(own, Trouble) or any(isinstance(a, AddFinalizer | DropFinalizer) for a in decided.actions):
        return decided
    return dataclasses.replace(decided, actions=(*own, *decided.actions))


def _release(run: Obj, jobs: list[Obj]) -> Plan:
    """The members are free only when the driver's pod is gone: the Job is deleted in the foreground and waited for."""
    if jobs:
        return Plan(tuple(Delete(Ref.of(j), j["metadata"]["uid"]) for j in jobs if not observe.deleting(j)))
    return Plan((_drop(run),)) if admission.announced(run) else Plan()


def _drop(run: Obj) -> DropFinalizer:
    return DropFinalizer(Ref.of(run), run["metadata"]["uid"])


def _after(run: Obj, world: World) -> Plan:
    """A finished run gives its members back and lets its own pool sleep; late reports still count."""
    if admission.announced(run):
        return Plan((_drop(run),))
    spec = RLRunSpec.model_validate(run["spec"])
    actions = _own_pool(run, spec, world, idle=True)
    return Plan(() if isinstance(actions, Trouble) else tuple(actions), report(run, spec, world))


def _own_pool(run: Obj, spec: RLRunSpec, world: World, *, idle: bool) -> list[Action] | Trouble:
    """The pool of a run that names a runtime; `idle`: it has nothing to do."""
    if spec.runtime_ref is None:
        return []
    found = admission.population_of(run, world)
    if isinstance(found, Trouble):
        return found
    body = own_pool(run, spec, found[1], suspend=idle)
    ref = Ref.of(body)
    old = world.get(ref)
    if old and not any(o["uid"] == run["metadata"]["uid"] for o in old["metadata"]["ownerReferences"]):
        return Trouble("PoolNameTaken", f'BasePool "{ref.name}" exists and does not belong to this run: rename one')
    return [] if naming.as_applied(old, body) else [Apply(body)]


def _admit(run: Obj, spec: RLRunSpec, world: World, now: datetime, *, leaving: bool, obstacle: Trouble | None) -> Plan:
    """Announce, look, create: see `admission`. `leaving`: an earlier Job of this run is going away."""
    held = admission.announced(run)
    if spec.suspend:
        obstacle = Trouble("Suspended", "spec.suspend is true", "Normal")
        return waiting(run, spec, obstacle, world=world, now=now)
    if leaving:
        obstacle = Trouble("Starting", "an earlier Job of this run is going away", "Normal")
        return waiting(run, spec, obstacle, world=world, now=now)
    found = obstacle or admission.needs(run, world)
    if isinstance(found, Trouble):
        return Plan((_drop(run),)) if held else waiting(run, spec, found, world=world, now=now)
    if busy := admission.busy(run, world):
        return _yield(run, spec, busy, world, now)
    if not held:
        return Plan((AddFinalizer(Ref.of(run), run["metadata"]["uid"]),))
    parts = driver_parts(run, spec, found, world.options)
    actions: list[Action] = [*_bundle(run, parts, world), Create(render.driver_job(run, parts))]
    return running(run, spec, None, world=world, now=now, actions=actions, volumes=render.volume_names(parts))


def _yield(run: Obj, spec: RLRunSpec, busy: Busy, world: World, now: datetime) -> Plan:
    if busy.withdraw:
        return Plan((_drop(run),))
    return waiting(run, spec, busy.trouble, world=world, now=now)


def _drive(run: Obj, spec: RLRunSpec, job: Obj, world: World, now: datetime) -> Plan:
    """There is a Job: keep its bundle and suspension as the spec says, until it ends."""
    if end := ended(job):
        return final(run, spec, job, end, world=world, now=now)
    actions: list[Action] = []
    found = admission.needs(run, world)
    volumes = ""
    if isinstance(found, Needs):
        parts = driver_parts(run, spec, found, world.options)
        actions += _bundle(run, parts, world)
        volumes = render.volume_names(parts)
    uid = job["metadata"]["uid"]
    if naming.queued(run):
        if spec.suspend:  # its suspend field is Kueue's
            actions.append(Delete(Ref.of(job), uid))
    elif job["spec"]["suspend"] != spec.suspend:
        actions.append(Patch(Ref.of(job), uid, {"spec": {"suspend": spec.suspend}}))
    return running(run, spec, job, world=world, now=now, actions=actions, volumes=volumes)


def _bundle(run: Obj, parts: render.DriverParts, world: World) -> list[Action]:
    body = render.bundle_config_map(run, parts.bundle)
    return [] if naming.as_applied(world.get(Ref.of(body)), body) else [Apply(body)]


def driver_parts(run: Obj, spec: RLRunSpec, needs: Needs, options: Options) -> render.DriverParts:
    """The driver of a run, from the resources as they are now."""
    namespace, pool = run["metadata"]["namespace"], needs.pool["metadata"]["name"]
    bundle = RunBundle(
        namespace=namespace,
        run=run["metadata"]["name"],
        run_uid=run["metadata"]["uid"],
        run_generation=run["metadata"].get("generation", 1),
        population=needs.population["metadata"]["name"],
        population_uid=needs.population["metadata"]["uid"],
        population_generation=needs.population["metadata"].get("generation", 1),
        run_spec=spec,
        population_spec=needs.population_spec,
        base_uri=needs.pool_spec.base.uri,
        image=needs.runtime.images.driver,
    )
    return render.DriverParts(
        bundle=bundle,
        runtime=needs.runtime,
        store=StoreAccess.of(needs.store),
        trainer_url=naming.trainer_url(pool, namespace, options),
        gateway_urls=(naming.gateway_url(pool, namespace, options),),
        report_url=options.operator_url,
    )
