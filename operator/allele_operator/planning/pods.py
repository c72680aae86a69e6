"""Pods → what is wrong with them, in words that name the secret, image, quota or exit that is to blame."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from allele_operator.planning import observe
from allele_operator.planning.conditions import Trouble
from allele_operator.planning.model import Obj

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CALM = {"ContainerCreating", "PodInitializing"}
_MISSING = (
    (re.compile(r'secret "([^"]+)" not found'), "SecretMissing"),
    (re.compile(r"couldn't find key \S+ in Secret (\S+)"), "SecretMissing"),
    (re.compile(r'configmap "([^"]+)" not found'), "ConfigMapMissing"),
)


def trouble(pods: Iterable[Obj]) -> Trouble | None:
    """The gravest trouble of the pods that live, None when there is none or they have just been made."""
    found = [t for pod in pods if not observe.deleting(pod) for t in _troubles(pod)]
    return min(found, key=lambda t: _ORDER.index(t.reason), default=None)


_ORDER = (
    *("SecretMissing", "ConfigMapMissing", "ContainerConfigInvalid", "ImageUnavailable", "InitFailed"),
    *("ContainerNotStarted", "CrashLoop", "Unschedulable", "Restarting", "PodFailed", "VolumesPending"),
)


def _troubles(pod: Obj) -> Iterator[Trouble]:
    status, name = pod["status"], pod["metadata"]["name"]
    if unscheduled := status.get("unscheduled"):
        yield Trouble("Unschedulable", f"{name}: {unscheduled.get('message', '')}")
    if status["phase"] == "Failed":
        ends = [_end(c["terminated"]) for c in status["containers"] if _failed(c.get("terminated"))]
        why = "; ".join(filter(None, [status.get("reason"), status.get("message"), *ends]))
        yield Trouble("PodFailed", f"{name}: {why or 'failed'}")
        return
    for container in status["containers"]:
        if found := _container(container, f"{name}/{container['name']}"):
            yield found


def _container(container: Obj, at: str) -> Trouble | None:
    waiting, last = container.get("waiting"), container.get("terminated") or container.get("last")
    reason = (waiting or {}).get("reason", "")
    text = f"{at}: {(waiting or {}).get('message') or reason}"
    if reason == "CreateContainerConfigError":
        missing = next((r for pattern, r in _MISSING if pattern.search(text)), "ContainerConfigInvalid")
        return Trouble(missing, text)
    if reason in _IMAGE:
        return Trouble("ImageUnavailable", text)
    if _failed(last) and container["init"] and not container.get("running"):
        return Trouble("InitFailed", f"{at}: {_end(last or {})}")
    if reason == "CrashLoopBackOff":
        return Trouble("CrashLoop", f"{at}: restarted {container['restarts']} times; {_end(last or {})}")
    if waiting and reason not in _CALM:
        return Trouble("ContainerNotStarted", text)
    if _failed(last) and not container["ready"] and not container["init"]:
        return Trouble("Restarting", f"{at}: {_end(last or {})}")
    return None


def _failed(end: Obj | None) -> bool:
    return bool(end) and (end or {}).get("exitCode", 0) != 0


def _end(end: Obj) -> str:
    why = end.get("message", "").strip() or end.get("reason", "")
    return f"exit code {end.get('exitCode', '?')}" + (f": {why}" if why else "")


def ready(pods: Iterable[Obj]) -> int:
    return sum(p["status"]["ready"] for p in pods if not observe.deleting(p))


def restarts(pods: Iterable[Obj]) -> int:
    """Restarts of main containers."""
    return sum(c["restarts"] for p in pods for c in p["status"]["containers"] if not c["init"])
