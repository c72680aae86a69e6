"""Raw objects → slim ones, so that a cache of thousands stays small and a plan compares only what it uses.

A projection keeps the shape of the original (metadata, spec, status), hence the same accessors serve raw test data.
For a pod the states of its containers are reduced to what explains it: `status.containers`, init containers first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from allele.api.schema import GROUP
from allele_operator.planning.model import PLANNED, RESOURCES, Obj

MESSAGE_LIMIT = 4096
"""Characters kept of a message, what kubelet keeps of a termination message; conditions take the first 1024."""
_METADATA = ("namespace", "name", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def project(kind: str, raw: Obj) -> Obj:
    """The slim copy of an object as the API server sent it (list items lack apiVersion and kind: both are filled)."""
    slim: Obj = {"apiVersion": RESOURCES[kind].api_version, "kind": kind, "metadata": _metadata(kind, raw["metadata"])}
    if kind in PLANNED:
        return slim | {"spec": raw.get("spec") or {}, "status": raw.get("status") or {}}
    fields = _CHILDREN.get(kind)
    return slim | fields(raw.get("spec") or {}, raw.get("status") or {}) if fields else slim


def _metadata(kind: str, raw: Obj) -> Obj:
    kept = {k: raw[k] for k in _METADATA if raw.get(k) is not None}
    kept["labels"] = dict(raw.get("labels") or {})
    annotations = raw.get("annotations") or {}
    if kind in PLANNED:
        kept["annotations"] = {k: v for k, v in annotations.items() if k != _LAST_APPLIED}
    else:
        kept["annotations"] = {k: v for k, v in annotations.items() if k.startswith(GROUP + "/")}
    kept["finalizers"] = list(raw.get("finalizers") or ())
    kept["ownerReferences"] = [
        {k: o[k] for k in ("apiVersion", "kind", "name", "uid") if k in o} for o in raw.get("ownerReferences") or ()
    ]
    return kept


def _conditions(status: Obj) -> list[Obj]:
    keep = ("type", "status", "reason", "message", "lastTransitionTime")
    return [_cut({k: c[k] for k in keep if k in c}) for c in status.get("conditions") or ()]


def _cut(entry: Obj) -> Obj:
    return entry | ({"message": entry["message"][:MESSAGE_LIMIT]} if entry.get("message") else {})


def _job_set(spec: Obj, status: Obj) -> Obj:
    return {
        "spec": {
            "suspend": bool(spec.get("suspend")),
            "replicatedJobs": [
                {"name": r["name"], "parallelism": r.get("template", {}).get("spec", {}).get("parallelism", 1)}
                for r in spec.get("replicatedJobs") or ()
            ],
        },
        "status": {"conditions": _conditions(status), "restarts": status.get("restarts", 0)},
    }


def _job(spec: Obj, status: Obj) -> Obj:
    counts = {k: status.get(k, 0) for k in ("active", "ready", "succeeded", "failed")}
    times = {k: status[k] for k in ("startTime", "completionTime") if status.get(k)}
    return {
        "spec": {"suspend": bool(spec.get("suspend")), "parallelism": spec.get("parallelism", 1)},
        "status": {"conditions": _conditions(status)} | counts | times,
    }


def _pod(spec: Obj, status: Obj) -> Obj:
    init = [_container(c, init=True) for c in status.get("initContainerStatuses") or ()]
    main = [_container(c, init=False) for c in status.get("containerStatuses") or ()]
    conditions = {c["type"]: c for c in _conditions(status)}
    slim: Obj = {"phase": status.get("phase", ""), "containers": init + main}
    slim["ready"] = conditions.get("Ready", {}).get("status") == "True"
    slim["readySince"] = conditions.get("Ready", {}).get("lastTransitionTime", "") if slim["ready"] else ""
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        slim["unscheduled"] = _cut({"reason": scheduled.get("reason", ""), "message": scheduled.get("message", "")})
    for key in ("reason", "message"):
        if status.get(key):
            slim[key] = str(status[key])[:MESSAGE_LIMIT]
    return {"spec": {"nodeName": spec.get("nodeName", "")}, "status": slim}


def _container(raw: Obj, *, init: bool) -> Obj:
    """{name, init, ready, restarts, waiting?, running?, terminated?, last?}: `last` is the previous end, if any."""
    state = raw.get("state") or {}
    out: Obj = {
        "name": raw["name"],
        "init": init,
        "ready": bool(raw.get("ready")),
        "restarts": raw.get("restartCount", 0),
    }
    if waiting := state.get("waiting"):
        out["waiting"] = _pick(waiting, ("reason", "message"))
    if state.get("running") is not None:
        out["running"] = True
    if terminated := state.get("terminated"):
        out["terminated"] = _pick(terminated, _ENDS)
    if last := (raw.get("lastState") or {}).get("terminated"):
        out["last"] = _pick(last, _ENDS)
    return out


_ENDS = ("exitCode", "signal", "reason", "message", "finishedAt")


def _pick(raw: Obj, keys: Iterable[str]) -> Obj:
    return _cut({k: raw[k] for k in keys if raw.get(k) is not None})


_CHILDREN: dict[str, Callable[[Obj, Obj], Obj]] = {"JobSet": _job_set, "Job": _job, "Pod": _pod}


def condition(obj: Obj | None, type_: str) -> Obj:
    """The condition of that type, or {}."""
    conditions: list[Obj] = ((obj or {}).get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == type_), {})


def is_true(obj: Obj | None, type_: str) -> bool:
    return condition(obj, type_).get("status") == "True"


def deleting(obj: Obj) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def spec(obj: Obj) -> dict[str, Any]:
    out: dict[str, Any] = obj.get("spec") or {}
    return out
