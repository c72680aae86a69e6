"""When a run may start: all it names is there and fits, and nobody else trains its members.

Two runs are planned at the same time by different workers, each from a world that may not show the other's last step.
So a run announces itself first, by its finalizer, then looks for others that did, then creates its Job. Of two that
announced themselves the one created later, or with the later name, takes it back unless it already has its Job; the
other waits until then. Hence at most one has a Job, and which one does not depend on who was planned first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from allele.api.pool import BasePoolSpec
from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.runtime import AdapterRuntimeSpec
from allele.api.store import AdapterStoreSpec
from allele_operator.planning import observe, selection
from allele_operator.planning.conditions import Severity, Trouble
from allele_operator.planning.model import FINALIZER, Obj, Ref, World
from allele_operator.planning.naming import own_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Everything that a driver is made from."""

    population: Obj
    population_spec: AdapterPopulationSpec
    pool: Obj
    pool_spec: BasePoolSpec
    runtime: AdapterRuntimeSpec
    store: AdapterStoreSpec


def pool_name(run: Obj) -> str:
    name: str = run["spec"].get("poolRef") or own_pool(run["metadata"]["name"])
    return name


def lookup(world: World, run: Obj, kind: str, name: str) -> Obj | None:
    return world.get(Ref(kind, run["metadata"]["namespace"], name))


def missing(kind: str, name: str, namespace: str, reason: str) -> Trouble:
    return Trouble(reason, f'{kind} "{name}" not found in namespace {namespace}')


def store_obstacle(obj: Obj, name: str, world: World) -> Trouble | None:
    """Why the object's store cannot be used."""
    store = lookup(world, obj, "AdapterStore", name)
    if store is None:
        return missing("AdapterStore", name, obj["metadata"]["namespace"], "StoreMissing")
    if observe.is_true(store, "Reachable"):
        return None
    why = observe.condition(store, "Reachable")
    text = f"{why['reason']}: {why['message']}" if why else "not probed yet"
    severity: Severity = "Warning" if why.get("status") == "False" else "Normal"
    return Trouble("StoreUnreachable", f'AdapterStore "{name}" is not reachable: {text}', severity)


def population_of(run: Obj, world: World) -> tuple[Obj, AdapterPopulationSpec] | Trouble:
    """The run's population, if it has what the run selects."""
    spec = RLRunSpec.model_validate(run["spec"])
    name, namespace = spec.population_ref, run["metadata"]["namespace"]
    population = lookup(world, run, "AdapterPopulation", name)
    if population is None:
        return missing("AdapterPopulation", name, namespace, "PopulationMissing")
    if observe.deleting(population):
        return Trouble("PopulationMissing", f'AdapterPopulation "{name}" is being deleted')
    population_spec = AdapterPopulationSpec.model_validate(population["spec"])
    if problem := selection.problem(spec, population_spec):
        return Trouble("SelectionInvalid", f'AdapterPopulation "{name}": {problem}')
    return population, population_spec


def needs(run: Obj, world: World) -> Needs | Trouble:
    """What the run's driver is made from, or what the run waits for."""
    found = population_of(run, world)
    if isinstance(found, Trouble):
        return found
    population, population_spec = found
    name, namespace = pool_name(run), run["metadata"]["namespace"]
    pool = lookup(world, run, "BasePool", name)
    if pool is None:
        if "poolRef" not in run["spec"]:
            return Trouble("PoolNotReady", f'BasePool "{name}" is being made', "Normal")
        return missing("BasePool", name, namespace, "PoolMissing")
    if observe.deleting(pool):
        return Trouble("PoolMissing", f'BasePool "{name}" is being deleted')
    pool_spec = BasePoolSpec.model_validate(pool["spec"])
    if wrong := _mismatch(run, population, population_spec, name, pool_spec):
        return wrong
    if not observe.is_true(pool, "Ready"):
        why = observe.condition(pool, "Ready")
        text = f"{why['reason']}: {why['message']}" if why else "not observed yet"
        return Trouble("PoolNotReady", f'BasePool "{name}" is not ready: {text}', "Normal")
    runtime = lookup(world, run, "AdapterRuntime", pool_spec.runtime_ref)
    store = lookup(world, run, "AdapterStore", pool_spec.store_ref)
    if runtime is None:
        return missing("AdapterRuntime", pool_spec.runtime_ref, namespace, "RuntimeMissing")
    if store is None:
        return missing("AdapterStore", pool_spec.store_ref, namespace, "StoreMissing")
    return Needs(
        population=population,
        population_spec=population_spec,
        pool=pool,
        pool_spec=pool_spec,
        runtime=AdapterRuntimeSpec.model_validate(runtime["spec"]),
        store=AdapterStoreSpec.model_validate(store["spec"]),
    )


def _mismatch(
    run: Obj, population: Obj, spec: AdapterPopulationSpec, pool: str, pool_spec: BasePoolSpec
) -> Trouble | None:
    """Why the population cannot be trained in the pool, whatever happens to either."""
    name = population["metadata"]["name"]
    if spec.base.digest != pool_spec.base.digest:
        return Trouble(
            "BaseMismatch",
            f'AdapterPopulation "{name}" adapts base {spec.base.digest}, '
            f'BasePool "{pool}" holds {pool_spec.base.digest}',
        )
    if spec.store_ref != pool_spec.store_ref:
        return Trouble(
            "StoreMismatch",
            f'AdapterPopulation "{name}" is in AdapterStore "{spec.store_ref}", BasePool "{pool}" uses '
            f'"{pool_spec.store_ref}": both must name the same one',
        )
    if pool_spec.trainer is None:
        return Trouble("TrainerMissing", f'BasePool "{pool}" has no trainer: it only serves')
    selected = {g["select"]["group"] for g in run["spec"]["groups"]}
    for group in spec.groups:
        if group.name not in selected:
            continue
        stored = group.adapter.stored_rank
        if stored > pool_spec.adapters.max_rank:
            twice = f" (twice {group.adapter.rank}, by baseMode Rank2r)" if stored > group.adapter.rank else ""
            return Trouble(
                "AdapterMismatch",
                f'group {group.name} has rank {stored}{twice}, BasePool "{pool}" makes room for at most '
                f"{pool_spec.adapters.max_rank}",
            )
        if extra := sorted(set(group.adapter.targets) - set(pool_spec.adapters.targets)):
            return Trouble(
                "AdapterMismatch",
                f'group {group.name} adapts {", ".join(extra)}, BasePool "{pool}" only '
                f"{', '.join(pool_spec.adapters.targets)}",
            )
    return None


def finished(run: Obj) -> bool:
    return observe.is_true(run, "Succeeded") or observe.is_true(run, "Failed")


def announced(run: Obj) -> bool:
    return FINALIZER in run["metadata"]["finalizers"]


def has_job(run: Obj, world: World) -> bool:
    return bool(world.owned(run["metadata"]["uid"], "Job"))


def holds(run: Obj, world: World) -> bool:
    """Whether the run's members are its own now."""
    return not finished(run) and (announced(run) or has_job(run, world))


def order(run: Obj) -> tuple[str, str]:
    return run["metadata"]["creationTimestamp"], run["metadata"]["name"]


@dataclasses.dataclass(frozen=True)
class Busy:
    """Somebody else has the members, or the first claim on them."""

    trouble: Trouble
    withdraw: bool
    """Whether this run must take its own announcement back."""


def busy(run: Obj, world: World) -> Busy | None:
    """Called before the run announces itself, and again before it creates its Job."""
    mine = announced(run)
    for other, group in _rivals(run, world):
        name = other["metadata"]["name"]
        if holds(other, world):
            message = f'members of group {group} are held by RLRun "{name}"'
            first = has_job(other, world) or order(other) < order(run)
            return Busy(Trouble("MembersBusy", message, "Normal"), withdraw=mine and first)
        if not mine and _goes_first(other, run, world):
            message = f'members of group {group} go to RLRun "{name}" first: it was created earlier'
            return Busy(Trouble("MembersBusy", message, "Normal"), withdraw=False)
    return None


def _rivals(run: Obj, world: World) -> Iterator[tuple[Obj, str]]:
    """Unfinished runs that train some of the same members, in order of creation, with the group that they share."""
    spec = RLRunSpec.model_validate(run["spec"])
    population = lookup(world, run, "AdapterPopulation", spec.population_ref)
    shape = AdapterPopulationSpec.model_validate(population["spec"]) if population else None
    mine = selection.parts(spec, shape)
    others = world.select("RLRun", run["metadata"]["namespace"])
    for other in sorted(others, key=order):
        if other["metadata"]["uid"] == run["metadata"]["uid"] or finished(other):
            continue
        if other["spec"].get("populationRef") != spec.population_ref:
            continue
        theirs = selection.parts(RLRunSpec.model_validate(other["spec"]), shape)
        if group := selection.overlap(mine, theirs):
            yield other, group


def _goes_first(other: Obj, run: Obj, world: World) -> bool:
    """An earlier run that waits for nothing but its turn."""
    waiting = observe.deleting(other) or other["spec"].get("suspend", False)
    return not waiting and order(other) < order(run) and isinstance(needs(other, world), Needs)
