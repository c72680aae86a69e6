"""What all pods have in common: PSA `restricted`, folders, environment, the platform's pod pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from allele.api.runtime import AdapterRuntimeSpec, Resources
from allele_operator.planning.model import Obj

BASE_DIR = "/allele/base"
CACHE_DIR = "/allele/cache"
HOME = "/home/allele"
ENVIRONMENT_DIR = "/env"
TOKEN_DIR = "/allele/token"
AUDIENCE = "allele-operator"
"""Of the tokens with which drivers and gateways report."""
_TOKEN_SECONDS = 3600
USER = 65532
RESERVED_VARIABLES = ("HOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
"""Set here for every container; a runtime's podTemplate.env may not."""


@dataclasses.dataclass(frozen=True)
class Volume:
    """A volume and where every container that takes it mounts it."""

    name: str
    path: str
    source: Obj
    read_only: bool = False

    @property
    def mount(self) -> Obj:
        return {"name": self.name, "mountPath": self.path} | ({"readOnly": True} if self.read_only else {})

    @property
    def body(self) -> Obj:
        return {"name": self.name} | self.source


def empty(name: str, path: str) -> Volume:
    return Volume(name, path, {"emptyDir": {}})


def shared_memory(runtime: AdapterRuntimeSpec) -> Volume:
    return Volume("shm", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": str(runtime.shared_memory)}})


def token() -> Volume:
    """A token that says which pod it was given to, and is good for reports only."""
    source = {"serviceAccountToken": {"audience": AUDIENCE, "expirationSeconds": _TOKEN_SECONDS, "path": "token"}}
    return Volume("token", TOKEN_DIR, {"projected": {"sources": [source]}}, read_only=True)


def report_arguments(url: str) -> list[str]:
    return ["--report", url, "--report-token-file", f"{TOKEN_DIR}/token"]


_SCRATCH = (empty("home", HOME), empty("tmp", "/tmp"))


def container(
    name: str,
    *,
    image: str,
    pull_policy: str,
    command: Sequence[str],
    env: Iterable[Mapping[str, Any]] = (),
    python_path: Sequence[str] = (),
    volumes: Iterable[Volume] = (),
    resources: Resources | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Obj:
    """One container. `extra` are ports and probes; HOME and /tmp are always there and writable."""
    own: list[Obj] = [{"name": "HOME", "value": HOME}, {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}]
    if python_path:
        own.append({"name": "PYTHONPATH", "value": ":".join(python_path)})
    out: Obj = {
        "name": name,
        "image": image,
        "imagePullPolicy": pull_policy,
        "command": list(command),
        "env": own + [dict(e) for e in env],
        "resources": _resources(resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [v.mount for v in (*_SCRATCH, *volumes)],
    }
    return out | dict(extra or {})


def _resources(resources: Resources | None) -> Obj:
    parts = {"requests": resources.requests, "limits": resources.limits} if resources else {}
    return {k: {n: str(q) for n, q in v.items()} for k, v in parts.items() if v}


def pod_spec(
    *,
    containers: Sequence[Obj],
    volumes: Iterable[Volume],
    init: Sequence[Obj] = (),
    service_account: str | None = None,
    restart_policy: str = "OnFailure",
    grace_seconds: int = 30,
) -> Obj:
    """A pod that PSA `restricted` admits. Volumes are listed once however many containers mount them."""
    bodies = {v.name: v.body for v in (*_SCRATCH, *volumes)}
    out: Obj = {
        "restartPolicy": restart_policy,
        "terminationGracePeriodSeconds": grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": list(containers),
        "volumes": list(bodies.values()),
    }
    if init:
        out["initContainers"] = list(init)
    if service_account:
        out["serviceAccountName"] = service_account
    return out


def pod_template(spec: Obj, runtime: AdapterRuntimeSpec, labels: Mapping[str, str]) -> Obj:
    """The pod with the platform team's pieces, passed through as they are."""
    pieces = runtime.pod_template
    extra: Obj = {}
    if pieces.node_selector:
        extra["nodeSelector"] = dict(pieces.node_selector)
    if pieces.tolerations:
        extra["tolerations"] = [dict(t) for t in pieces.tolerations]
    if pieces.priority_class_name:
        extra["priorityClassName"] = pieces.priority_class_name
    if pieces.scheduler_name:
        extra["schedulerName"] = pieces.scheduler_name
    if runtime.images.pull_secrets:
        extra["imagePullSecrets"] = [{"name": s} for s in runtime.images.pull_secrets]
    metadata: Obj = {"labels": dict(pieces.labels) | dict(labels)}
    if pieces.annotations:
        metadata["annotations"] = dict(pieces.annotations)
    return {"metadata": metadata, "spec": spec | extra}


def runtime_env(runtime: AdapterRuntimeSpec) -> list[Obj]:
    return [{"name": e.name, "value": e.value} for e in runtime.pod_template.env]


def environment(runtime: AdapterRuntimeSpec) -> tuple[Volume, ...]:
    """The development environment's claim, if the runtime has one."""
    if runtime.environment is None:
        return ()
    claim = {"persistentVolumeClaim": {"claimName": runtime.environment.claim_name, "readOnly": True}}
    return (Volume("env", ENVIRONMENT_DIR, claim, read_only=True),)


def http_probe(port: int, *, period: int = 5, failures: int = 3) -> Obj:
    return {
        "httpGet": {"path": "/healthz", "port": port},
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    }
