"""AdapterStore: is the bucket reachable with the credentials that pods will have, and does it do what commits need?

Only a pod can tell, since the operator holds no credentials: a probe Job answers in its termination message. It runs
when the spec changed, and again, ever less often, while something waits for a store that could not be reached.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from allele.api.store import AdapterStoreSpec
from allele_operator.planning import jobs, observe, pods
from allele_operator.planning.conditions import Found, Severity, Trouble, events, merged
from allele_operator.planning.model import Action, Create, Delete, Obj, Plan, Ref, World
from allele_operator.planning.render.access import StoreAccess
from allele_operator.planning.render.store import probe_job

_CAPABILITIES = {
    "create_only": "CreateOnly",
    "if_match": "IfMatch",
    "ranged_read": "RangedRead",
    "list": "List",
    "checksums": "Checksums",
}
_LATENCIES = {"put": "put", "get": "get", "conditional_put": "conditionalPut"}
_PROBING = Found("Reachable", None, "Probing", "a probe Job is finding out")


def plan(store: Obj, world: World, now: datetime) -> Plan:
    if observe.deleting(store):
        return Plan()
    spec = AdapterStoreSpec.model_validate(store["spec"])
    wanted = probe_job(store, spec, world.options)
    probes = world.owned(store["metadata"]["uid"], "Job")
    probe = next((j for j in probes if j["metadata"]["name"] == wanted["metadata"]["name"]), None)
    actions: list[Action] = [
        Delete(Ref.of(j), j["metadata"]["uid"]) for j in probes if j is not probe and not observe.deleting(j)
    ]
    found, wait = _PROBING, None
    if probe is None or observe.deleting(probe):
        found = _known(store) or _PROBING
        if probe is None and (found.status is None or (found.status is False and _awaited(store, world))):
            actions.append(Create(wanted))
    elif end := jobs.ended(probe):
        found = _result(store, probe, end, world)
        if found.status is False and _awaited(store, world):
            wait = jobs.again(store, "Reachable", end) - now
            if wait <= timedelta(0):
                actions.append(Delete(Ref.of(probe), probe["metadata"]["uid"]))
                wait = None
    else:
        trouble = pods.trouble(world.owned(probe["metadata"]["uid"], "Pod"))
        found = trouble.of("Reachable") if trouble else _known(store) or _PROBING
    return Plan(
        actions=tuple(actions),
        status=_status(store, spec, found, now=now) | _measured(store, probe, found, world),
        events=events(store, [found]),
        requeue=None if wait is None else wait.total_seconds(),
    )


def _status(store: Obj, spec: AdapterStoreSpec, found: Found, *, now: datetime) -> Obj:
    return {
        "observedGeneration": store["metadata"].get("generation", 0),
        "phase": {True: "Reachable", False: "Unreachable", None: "Probing"}[found.status],
        "url": f"{StoreAccess.of(spec).url}/{store['metadata']['namespace']}",
        "conditions": merged(store, [found], now),
    }


def _known(store: Obj) -> Found | None:
    """What an earlier probe of this very spec found, so that probing again does not make it unknown."""
    old = observe.condition(store, "Reachable")
    if old.get("observedGeneration") != store["metadata"].get("generation", 0) or old["status"] == "Unknown":
        return None
    severity: Severity = "Normal" if old["status"] == "True" else "Warning"
    return Found("Reachable", old["status"] == "True", old["reason"], old["message"], severity)


def _awaited(store: Obj, world: World) -> bool:
    name, namespace = store["metadata"]["name"], store["metadata"]["namespace"]
    return any(
        o["spec"].get("storeRef") == name for k in ("BasePool", "AdapterPopulation") for o in world.select(k, namespace)
    )


def _result(store: Obj, probe: Obj, end: Obj, world: World) -> Found:
    report, known = jobs.report(probe, world), _known(store)
    if report:
        reachable = bool(report.get("reachable"))
        reason = str(report.get("reason") or ("Reachable" if reachable else "Unreachable"))
        return Found(
            "Reachable", reachable, reason, str(report.get("message", "")), "Normal" if reachable else "Warning"
        )
    if known and (known.status or end["type"] == "Failed"):
        return known
    if end["type"] == "Complete":
        return Found("Reachable", True, "Reachable", "the probe Job succeeded")
    trouble = pods.trouble(world.owned(probe["metadata"]["uid"], "Pod"))
    return (trouble or Trouble("ProbeFailed", end.get("message", "the probe Job failed"))).of("Reachable")


def _measured(store: Obj, probe: Obj | None, found: Found, world: World) -> Obj:
    """`capabilities` and `latency` as the probe found them; without one, as an earlier probe of this very spec did."""
    report = jobs.report(probe, world) if probe else {}
    if not report:
        old = store["status"] if found.status is not None and _known(store) else {}
        return {"capabilities": []} | {k: old[k] for k in ("capabilities", "latency") if old.get(k)}
    measured: Obj = {"capabilities": [word for key, word in _CAPABILITIES.items() if report.get(key)]}
    if took := report.get("latency"):
        measured["latency"] = {word: math.ceil(took[key]) for key, word in _LATENCIES.items()}
    return measured
