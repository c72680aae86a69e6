"""What a pool's status says: conditions from its pods, or from what it waits for; slots, runs, endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime

from allele.api.pool import BasePoolSpec
from allele.protocol.progress import TrainerSlots
from allele_operator.planning import gateways, naming, observe, pods
from allele_operator.planning.conditions import Found, Trouble, events, merged
from allele_operator.planning.model import ROLE_LABEL, Event, GatewaySeen, Obj, Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolView:
    """What the plan saw of a pool."""

    spec: BasePoolSpec
    inputs: Trouble | None
    """What is missing to make pods from, if anything."""
    workloads: Sequence[Obj]
    pods: Sequence[Obj]
    queued: bool
    up_to_date: Found
    job_set: str
    runs: int
    used: int
    trainer: TrainerSlots | None
    """What the newest report of a run in the pool says of its trainer."""
    gateways: Sequence[GatewaySeen]
    listening: datetime

    def of(self, role: str) -> list[Obj]:
        return [p for p in self.pods if p["metadata"]["labels"].get(ROLE_LABEL) == role]


def ended(workload: Obj) -> Obj | None:
    """The condition that says that a workload is over."""
    final = ("Failed", "Completed", "Complete")
    return next((c for c in workload["status"]["conditions"] if c["type"] in final and c["status"] == "True"), None)


def conclude(
    pool: Obj, view: PoolView, *, options: Options, now: datetime
) -> tuple[Obj, tuple[Event, ...], float | None]:
    """(status, events, seconds until the status changes by itself)."""
    name, namespace = pool["metadata"]["name"], pool["metadata"]["namespace"]
    obstacle = _obstacle(pool, view)
    trainer, rollout = _trainer(view, obstacle), _rollout(view, obstacle)
    ready = _ready(view, obstacle, [c for c in (trainer, rollout) if c])
    there = {p["metadata"]["uid"] for p in view.of("rollout") if not observe.deleting(p)}
    reported = gateways.summed(pool, view.gateways, there, listening=view.listening, now=now)
    found = [c for c in (ready, trainer, rollout, view.up_to_date, *reported.conditions) if c]
    status: Obj = {
        "observedGeneration": pool["metadata"].get("generation", 0),
        "phase": _phase(ready),
        "replicas": pods.ready(view.of("rollout")),
        "selector": ",".join(f"{k}={v}" for k, v in sorted(naming.pool_labels(name, "rollout").items())),
        "jobSet": view.job_set,
        "endpoint": naming.endpoint(name, namespace, options),
        "runs": view.runs,
        "conditions": merged(pool, found, now),
    } | reported.status
    if view.spec.trainer is not None:
        status["slots"] = _slots(pool, view, view.spec.trainer.slots)
    told = [ready, *reported.conditions]
    if view.up_to_date.reason != "UpToDate":
        told.append(view.up_to_date)
    return status, events(pool, told), reported.requeue


def _slots(pool: Obj, view: PoolView, wanted: int | str) -> Obj:
    """As its trainer told a run that reset it; what it told before stays while nobody reports."""
    told = view.trainer
    if told is not None:
        return _filled(told.slots, view.used) | {"wave": told.wave, "reason": told.reason}
    old = pool["status"].get("slots", {})
    if isinstance(wanted, int):
        known = old.get("total") == wanted
        return _filled(wanted, view.used) | {"wave": old.get("wave", 0) if known else 0, "reason": "given"}
    kept = old if old.get("reason", "").startswith("auto") else {}
    return _filled(kept.get("total", 0), view.used) | {
        "wave": kept.get("wave", 0),
        "reason": kept.get("reason", "auto"),
    }


def _filled(total: int, used: int) -> Obj:
    return {"total": total, "used": min(total, used)}


def _obstacle(pool: Obj, view: PoolView) -> Trouble | None:
    """Why there are no pods at all."""
    if view.spec.suspend:
        return Trouble("Suspended", "spec.suspend is true: there are no pods", "Normal")
    if not view.workloads:
        return view.inputs or Trouble("Starting", "the pods are being made", "Normal")
    for workload in view.workloads:
        if over := ended(workload):
            text = f"{workload['kind']} {workload['metadata']['name']}: {over.get('message') or over['type']}"
            return Trouble(f"{workload['kind']}Failed", f"{text}; it is made anew after a minute")
    if view.queued and all(w["spec"]["suspend"] for w in view.workloads):
        queue = pool["metadata"]["labels"][naming.QUEUE_LABEL]
        namespace = pool["metadata"]["namespace"]
        return Trouble(
            "Queued",
            f"waits for quota in queue {queue}; `kubectl get workloads -n {namespace}` tells what is short",
            "Normal",
        )
    return None


def _starting(view: PoolView, role: str) -> Trouble:
    default = Trouble("Starting", f"the {role} is starting", "Normal")
    return pods.trouble(view.of(role)) or default


def _trainer(view: PoolView, obstacle: Trouble | None) -> Found | None:
    if view.spec.trainer is None:
        return None
    if obstacle:
        return obstacle.of("TrainerReady")
    if pods.ready(view.of("trainer")):
        return Found("TrainerReady", True, "Ready", "the trainer is ready")
    return _starting(view, "trainer").of("TrainerReady")


def _rollout(view: PoolView, obstacle: Trouble | None) -> Found:
    wanted, ready = view.spec.rollout.replicas, pods.ready(view.of("rollout"))
    if obstacle:
        return obstacle.of("RolloutReady")
    if wanted == 0:
        return Found("RolloutReady", False, "ScaledToZero", "spec.rollout.replicas is 0", "Normal")
    if ready >= wanted:
        return Found("RolloutReady", True, "Ready", f"{ready} of {wanted} rollouts are ready")
    trouble = _starting(view, "rollout")
    if ready == 0:
        return trouble.of("RolloutReady")
    text = f"{ready} of {wanted} rollouts are ready; {trouble.message}"
    return Found("RolloutReady", True, "SomeReady", text, trouble.severity)


def _ready(view: PoolView, obstacle: Trouble | None, roles: Sequence[Found]) -> Found:
    if obstacle:
        return obstacle.of("Ready")
    if wrong := next((c for c in roles if not c.status), None):
        return dataclasses.replace(wrong, type="Ready")
    return Found("Ready", True, "Ready", "; ".join(c.message for c in roles))


def _phase(ready: Found) -> str:
    if ready.status:
        return "Ready"
    return ready.reason if ready.reason in ("Suspended", "Queued", "Starting") else "Waiting"
