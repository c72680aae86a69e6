"""What a run's status says: conditions while it waits, runs and is over; numbers from the driver's last report.

`Running` sums up: its reason is why the run does not run, or what it is doing. `Exposed` is there once revisions have
been probed: False names the members that are served by an older one, and why. Without a report (the operator has just
started) the numbers of the old status stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from allele.api.run import RLRunSpec
from allele.protocol.progress import Progress
from allele_operator.planning import admission, naming, observe, pods, selection
from allele_operator.planning.conditions import LIMIT, Found, Severity, Trouble, events, merged
from allele_operator.planning.model import Action, Obj, Plan, World

_OPEN = "NotFinished"
EXPOSED = "Exposed"


def waiting(run: Obj, spec: RLRunSpec, trouble: Trouble, *, world: World, now: datetime) -> Plan:
    """Not admitted, or admitted before and without a Job now."""
    suspended = trouble.reason == "Suspended"
    phase = "Suspended" if suspended else "Waiting"
    kept = suspended and admission.announced(run)
    admitted = Found("Admitted", True, "Admitted", "its members are its own") if kept else trouble.of("Admitted")
    return _plan(run, spec, [admitted, trouble.of("Running"), *_not_over()], phase=phase, job="", world=world, now=now)


def running(
    run: Obj,
    spec: RLRunSpec,
    job: Obj | None,
    *,
    world: World,
    now: datetime,
    actions: Sequence[Action],
    volumes: str,
) -> Plan:
    """Admitted: there is a Job, or `actions` create it. `volumes` are what its pod may wait for."""
    admitted = Found("Admitted", True, "Admitted", "its members are its own")
    found = _running(run, spec, job, volumes, world)
    phase = found.reason if found.status or found.reason in ("Starting", "Suspended", "Queued") else "Waiting"
    name = job["metadata"]["name"] if job else ""
    plan = _plan(run, spec, [admitted, found, *_not_over()], phase=phase, job=name, world=world, now=now)
    return Plan(tuple(actions), plan.status, plan.events)


def _running(run: Obj, spec: RLRunSpec, job: Obj | None, volumes: str, world: World) -> Found:
    starting = Trouble("Starting", "the driver is starting", "Normal").of("Running")
    if job is None:
        return starting
    if spec.suspend:
        return Found("Running", False, "Suspended", "spec.suspend is true", "Normal")
    if job["spec"]["suspend"] and naming.queued(run):
        queue = run["metadata"]["labels"][naming.QUEUE_LABEL]
        return Found("Running", False, "Queued", f"the driver waits for quota in queue {queue}", "Normal")
    own = world.owned(job["metadata"]["uid"], "Pod")
    if trouble := pods.trouble(own):
        return trouble.of("Running")
    if not pods.ready(own):
        for pod in own:
            text = f"{pod['metadata']['name']} is starting"
            return Trouble("Starting", text + (f"; it needs {volumes}" if volumes else ""), "Normal").of("Running")
        return starting
    return _working(run, spec, world)


def _working(run: Obj, spec: RLRunSpec, world: World) -> Found:
    """The driver runs: what it says, unless its pool is what it waits for."""
    pool = admission.lookup(world, run, "BasePool", admission.pool_name(run))
    if not observe.is_true(pool, "Ready"):
        why = observe.condition(pool, "Ready")
        text = f"{why.get('reason', 'Missing')}: {why.get('message', 'not found')}"
        return Found("Running", True, "PoolNotReady", f"the driver waits for its pool: {text}", "Warning")
    progress = world.progress(run["metadata"]["uid"])
    old = observe.condition(run, "Running")
    if progress is None:
        if old.get("status") == "True" and old["reason"] != "PoolNotReady":
            return Found("Running", True, old["reason"], old["message"])
        return Found("Running", True, "Training", f"the driver runs; it has not reported yet; {spec.stop.steps} steps")
    phase = progress.phase if progress.phase in ("Starting", "Training") else "Finishing"
    return Found("Running", True, phase, progress.message or f"step {progress.step} of {progress.steps}")


def _not_over() -> list[Found]:
    return [Found(t, False, _OPEN, "the run is not over") for t in ("Succeeded", "Failed")]


def final(run: Obj, spec: RLRunSpec, job: Obj, end: Obj, *, world: World, now: datetime) -> Plan:
    """The driver's Job is over."""
    admitted = Found("Admitted", True, "Admitted", "its members were its own")
    name = job["metadata"]["name"]
    if end["type"] == "Complete":
        text = f"Job {name} completed"
        outcome = [
            Found("Succeeded", True, "Succeeded", text),
            Found("Failed", False, "Succeeded", text),
        ]
        over = Found("Running", False, "Succeeded", text)
        phase = "Succeeded"
    else:
        text = _why_failed(run, job, end, world)
        outcome = [
            Found("Succeeded", False, "DriverFailed", text, "Warning"),
            Found("Failed", True, "DriverFailed", text, "Warning"),
        ]
        over = Found("Running", False, "DriverFailed", text, "Warning")
        phase = "Failed"
    return _plan(run, spec, [admitted, over, *outcome], phase=phase, job=name, world=world, now=now)


def _why_failed(run: Obj, job: Obj, end: Obj, world: World) -> str:
    """The driver's last words first: Kubernetes deletes the pod, so they may be in the old condition only."""
    progress = world.progress(run["metadata"]["uid"])
    trouble = pods.trouble(world.owned(job["metadata"]["uid"], "Pod"))
    old = observe.condition(run, "Running")
    words = [progress.message if progress and progress.phase == "Failed" else "", trouble.message if trouble else ""]
    if not any(words) and old.get("status") == "False" and old.get("reason") not in ("Starting", "Suspended"):
        words.append(old.get("message", ""))
    words.append(f"Job {job['metadata']['name']}: {end.get('reason', 'Failed')}: {end.get('message', '')}")
    return "; ".join(w for w in words if w)[:LIMIT]


def report(run: Obj, spec: RLRunSpec, world: World) -> Obj:
    """The status of a finished run, with what its driver reported last."""
    generation = run["metadata"].get("generation", 0)
    return {**run["status"], **_numbers(run, spec, world), "observedGeneration": generation}


def _exposed(run: Obj, world: World) -> list[Found]:
    """Whether the newest revisions are served; nothing before the first probe. What was found stays with the run."""
    progress = world.progress(run["metadata"]["uid"])
    if progress is not None and progress.probes is not None:
        probes = progress.probes
        severity: Severity = "Warning" if probes.failing else "Normal"
        return [Found(EXPOSED, not probes.failing, probes.reason, probes.message, severity, flickers=True)]
    if old := observe.condition(run, EXPOSED):
        return [Found(EXPOSED, old["status"] == "True", old["reason"], old["message"])]
    return []


def _plan(run: Obj, spec: RLRunSpec, found: list[Found], *, phase: str, job: str, world: World, now: datetime) -> Plan:
    found = [*found, *_exposed(run, world)]
    status = {
        "observedGeneration": run["metadata"].get("generation", 0),
        "phase": phase,
        "job": job,
        "restarts": _restarts(run, job, world),
        "conditions": merged(run, found, now),
    } | _numbers(run, spec, world)
    told = [f for f in found if f.reason != _OPEN]
    return Plan(status=status, events=events(run, told))


def _restarts(run: Obj, job: str, world: World) -> int:
    """Restarts of containers and pods; they are counted on when Job or pod go."""
    counted = 0
    for j in world.owned(run["metadata"]["uid"], "Job"):
        if j["metadata"]["name"] == job:
            own = world.owned(j["metadata"]["uid"], "Pod")
            counted = pods.restarts(own) + int(j["status"]["failed"])
    return max(counted, int(run["status"].get("restarts", 0)))


def _numbers(run: Obj, spec: RLRunSpec, world: World) -> Obj:
    progress, old = world.progress(run["metadata"]["uid"]), run["status"]
    if progress is not None:
        return _reported(progress)
    members = old.get("members") or _expected(run, spec, world)
    out: Obj = {k: old.get(k, 0) for k in ("trained", "failed", "policyLag", "committed", "exposed")}
    out["members"] = members
    out["progress"] = old.get("progress") or {"step": 0, "steps": spec.stop.steps, "percentage": 0}
    if old.get("reward"):
        out["reward"] = old["reward"]
    return out


def _expected(run: Obj, spec: RLRunSpec, world: World) -> int:
    """Members by the spec, before the driver has read manifests."""
    found = admission.population_of(run, world)
    return 0 if isinstance(found, Trouble) else selection.size(spec, found[1]) or 0


def _reported(progress: Progress) -> Obj:
    steps = max(progress.steps, progress.step)
    numbers: Obj = {
        "progress": {
            "step": progress.step,
            "steps": steps,
            "percentage": 100 * progress.step // steps if steps else 0,
        },
        "members": progress.members,
        "trained": progress.trained,
        "failed": len(progress.failed_members),
        "policyLag": progress.policy_lag,
        "committed": progress.committed,
        "exposed": progress.exposed,
    }
    if progress.eta_seconds is not None:
        numbers["progress"]["etaSeconds"] = max(0, progress.eta_seconds)
    if progress.reward is not None:
        reward = progress.reward
        numbers["reward"] = {
            k: f"{v:.4g}" for k, v in (("mean", reward.mean), ("best", reward.best), ("worst", reward.worst))
        }
    return numbers
