"""Names, addresses and digests of what the operator makes: one place, since Services, Jobs and drivers must agree."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from allele_operator.planning.model import (
    APPLIED_ANNOTATION,
    POOL_LABEL,
    ROLE_LABEL,
    Obj,
    Options,
)

TRAINER_PORT = 7070
TENANT_PORT = 8000
INTERNAL_PORT = 8001
ENGINE_PORT = 30000
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_KUEUE = "kueue.x-k8s.io/"


def digest(value: Any, length: int = 8) -> str:
    """First hex digits of the sha256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def own_pool(run: str) -> str:
    """Name of the pool that a run with runtimeRef gets."""
    return f"{run}-pool"


def bundle_name(run: str) -> str:
    return f"{run}-bundle"


def trainer_service(pool: str) -> str:
    return f"{pool}-trainer"


def rollout_service(pool: str) -> str:
    return f"{pool}-rollout"


def host(service: str, namespace: str, options: Options) -> str:
    return f"{service}.{namespace}.svc.{options.cluster_domain}"


def trainer_url(pool: str, namespace: str, options: Options) -> str:
    return f"http://{host(trainer_service(pool), namespace, options)}:{TRAINER_PORT}"


def gateway_url(pool: str, namespace: str, options: Options) -> str:
    """Headless, ready pods only: a driver resolves it into one address a gateway."""
    return f"http://{host(rollout_service(pool), namespace, options)}:{INTERNAL_PORT}"


def endpoint(pool: str, namespace: str, options: Options) -> str:
    return f"http://{host(pool, namespace, options)}/v1"


def pool_labels(pool: str, role: str) -> dict[str, str]:
    return {POOL_LABEL: pool, ROLE_LABEL: role}


def queue_labels(owner: Obj) -> dict[str, str]:
    """Kueue's labels of the owner, passed through to what is queued for it."""
    labels = owner["metadata"].get("labels") or {}
    return {k: v for k, v in labels.items() if k.startswith(_KUEUE)}


def queued(obj: Obj) -> bool:
    """Whether Kueue decides when it runs; then its suspend field is Kueue's, never ours."""
    return QUEUE_LABEL in (obj["metadata"].get("labels") or {})


def owner_reference(owner: Obj) -> Obj:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def applied(body: Obj) -> Obj:
    """The manifest with the digest of itself, by which the next plan knows that it is there as wanted."""
    metadata = body["metadata"]
    annotations = metadata.get("annotations", {}) | {APPLIED_ANNOTATION: digest(body, 16)}
    return body | {"metadata": metadata | {"annotations": annotations}}


def as_applied(found: Obj | None, body: Obj) -> bool:
    annotations = (found or {}).get("metadata", {}).get("annotations") or {}
    return bool(annotations.get(APPLIED_ANNOTATION) == body["metadata"]["annotations"][APPLIED_ANNOTATION])
