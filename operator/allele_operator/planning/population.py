"""AdapterPopulation: is its store there, how many members has it, what did runs make of them, and is it collected?

The catalogue in the store is the truth about revisions; the operator cannot read it and adds up what runs report. What
has been counted once stays, since revisions do and runs do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.store import AdapterStoreSpec
from allele_operator.planning import collection, erasure, observe, selection
from allele_operator.planning.admission import lookup, order, store_obstacle
from allele_operator.planning.conditions import Found, events, merged
from allele_operator.planning.model import Obj, Plan, World
from allele_operator.planning.render.upkeep import folder
from allele_operator.planning.run_status import EXPOSED


def plan(population: Obj, world: World, now: datetime) -> Plan:
    if observe.deleting(population):
        return erasure.plan(population, world, now)
    if action := erasure.finalizer(population):
        return Plan((action,))
    spec = AdapterPopulationSpec.model_validate(population["spec"])
    name, namespace = population["metadata"]["name"], population["metadata"]["namespace"]
    runs = sorted((r for r in world.select("RLRun", namespace) if r["spec"].get("populationRef") == name), key=order)
    total = _total(spec, runs, _old(population, "members", "total"))
    ready = _ready(population, spec, world, total)
    actions, collected = collection.plan(population, spec, runs, world)
    found = [ready, *collected, *_exposed(spec, runs)]
    status = {
        "observedGeneration": population["metadata"].get("generation", 0),
        "phase": "Ready" if ready.status else "Waiting",
        "members": {
            "total": total,
            "trained": min(total, max(_old(population, "members", "trained"), _distinct(spec, runs, "trained"))),
            "failed": min(total, _distinct(spec, runs, "failed")),
        },
        "revisions": {k: _summed(population, runs, k) for k in ("committed", "exposed")},
        "url": _url(population, spec, world),
        "conditions": merged(population, found, now),
    }
    return Plan(tuple(actions), status, events(population, found))


def _ready(population: Obj, spec: AdapterPopulationSpec, world: World, total: int) -> Found:
    if obstacle := store_obstacle(population, spec.store_ref, world):
        return obstacle.of("Ready")
    return Found("Ready", True, "Ready", f"{total} members in {len(spec.groups)} groups")


def _url(population: Obj, spec: AdapterPopulationSpec, world: World) -> str:
    """Stays when the store's object goes: its bucket does not."""
    store = lookup(world, population, "AdapterStore", spec.store_ref)
    old: str = population["status"].get("url", "")
    return folder(population, AdapterStoreSpec.model_validate(store["spec"])) if store else old


def _old(population: Obj, part: str, field: str) -> int:
    value: int = (population["status"].get(part) or {}).get(field, 0)
    return value


def _total(spec: AdapterPopulationSpec, runs: Sequence[Obj], old: int) -> int:
    """Declared members; those of a manifest are counted by the first driver that reads it."""
    counted = sum(g.members.count or 0 for g in spec.groups)
    listed = {g.name for g in spec.groups if g.members.manifest}
    if not listed:
        return counted
    return max([old, counted, *(_listed(spec, run, listed) for run in runs)])


def _listed(spec: AdapterPopulationSpec, run: Obj, listed: set[str]) -> int:
    """Members that a run over whole groups found, the other groups by count added."""
    parts = selection.parts(RLRunSpec.model_validate(run["spec"]), spec)
    selected = {p.group for p in parts}
    if not (listed <= selected and all(p.whole for p in parts)):
        return 0
    return int(run["status"].get("members", 0)) + sum(
        g.members.count or 0 for g in spec.groups if g.name not in selected
    )


def _exposed(spec: AdapterPopulationSpec, runs: Sequence[Obj]) -> list[Found]:
    """As the newest run of each member found; nothing before any probed."""
    taken: list[selection.Part] = []
    told: list[tuple[str, Obj]] = []
    for run in reversed(runs):
        condition = observe.condition(run, EXPOSED)
        parts = selection.parts(RLRunSpec.model_validate(run["spec"]), spec)
        if condition and not selection.overlap(taken, parts):
            taken += parts
            told.append((run["metadata"]["name"], condition))
    failing = [(name, c) for name, c in told if c["status"] == "False"]
    if failing:
        text = "; ".join(f"RLRun {name}: {c['message']}" for name, c in failing)
        return [Found(EXPOSED, False, failing[0][1]["reason"], text, "Warning", flickers=True)]
    return [Found(EXPOSED, True, c["reason"], c["message"], flickers=True) for _, c in told[:1]]


def _distinct(spec: AdapterPopulationSpec, runs: Sequence[Obj], field: str) -> int:
    """Sum over the newest runs that share no member: a member counts once."""
    taken: list[selection.Part] = []
    total = 0
    for run in reversed(runs):
        count = int(run["status"].get(field, 0))
        parts = selection.parts(RLRunSpec.model_validate(run["spec"]), spec)
        if count and not selection.overlap(taken, parts):
            taken += parts
            total += count
    return total


def _summed(population: Obj, runs: Sequence[Obj], field: str) -> int:
    """At least what was counted before: the runs that made them may be gone."""
    return max(_old(population, "revisions", field), sum(int(r["status"].get(field, 0)) for r in runs))
