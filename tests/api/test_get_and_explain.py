"""`kubectl get` tells the state and why; `kubectl explain` explains every field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.kubectl import Kubectl
from tests.api.manifests import SPECS, manifest

TIME = "2026-01-01T00:00:00Z"


def _condition(type_: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "type": type_,
        "status": status,
        "reason": reason,
        "message": message,
        "observedGeneration": 1,
        "lastTransitionTime": TIME,
    }


STATUSES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "AdapterStore": (
        "ast",
        {
            "url": "s3://adapters/ns",
            "capabilities": ["CreateOnly"],
            "conditions": [_condition("Reachable", "False", "SecretMissing", 'secret "s3" not found')],
        },
        ["False", "SecretMissing", "s3://adapters/ns"],
    ),
    "AdapterRuntime": ("art", {"conditions": [_condition("Valid", "True", "Valid", "fine")]}, ["True", "Valid"]),
    "BasePool": (
        "bp",
        {
            "replicas": 2,
            "slots": {"total": 16, "used": 5},
            "runs": 3,
            "endpoint": "http://x/v1",
            "conditions": [
                _condition("Ready", "True", "AllWell", "fine"),
                _condition("TrainerReady", "True", "Ready", ""),
            ],
        },
        ["True", "AllWell", "5", "16", "2", "3"],
    ),
    "AdapterPopulation": (
        "apop",
        {
            "members": {"total": 16, "trained": 7, "failed": 1},
            "revisions": {"committed": 70, "exposed": 69},
            "conditions": [_condition("Ready", "True", "AllWell", "fine")],
        },
        ["True", "AllWell", "16", "7", "1", "70"],
    ),
    "RLRun": (
        "rlr",
        {
            "phase": "Training",
            "members": 16,
            "trained": 16,
            "progress": {"step": 7, "steps": 40, "percentage": 17, "etaSeconds": 90},
            "reward": {"mean": "0.61", "best": "1", "worst": "0.2"},
            "conditions": [
                _condition("Admitted", "True", "Admitted", ""),
                _condition("Running", "True", "Stepping", "step 7 of 40"),
            ],
        },
        ["Training", "Stepping", "7", "40", "0.61", "16"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _objects(kubectl: Kubectl) -> None:
    for kind, (short, status, _) in STATUSES.items():
        kubectl.ok("apply", "--server-side", "-f=-", given=manifest(kind, name="shown"))
        patch = json.dumps({"status": status})
        kubectl.ok("patch", short, "shown", "--subresource=status", "--type=merge", "--patch", patch)


@pytest.mark.parametrize("kind", STATUSES)
def test_get_shows_state_and_reason(kubectl: Kubectl, kind: str) -> None:
    short, _, cells = STATUSES[kind]
    row = kubectl.ok("get", short, "shown", "--no-headers").split()
    assert row[:-1] == ["shown", *cells]


def test_wide_get_adds_the_sentence(kubectl: Kubectl) -> None:
    assert 'secret "s3" not found' in kubectl.ok("get", "ast", "shown", "-o=wide")
    assert "step 7 of 40" in kubectl.ok("get", "rlr", "shown", "-o=wide")


def test_one_category_lists_all_kinds(kubectl: Kubectl) -> None:
    listed = kubectl.ok("get", "allele", "-o=name")
    assert {line.split(".")[0] for line in listed.split()} == {k.lower() for k in STATUSES}


def test_scale_reports_ready_rollouts(kubectl: Kubectl) -> None:
    path = f"/apis/allele.dev/v1alpha1/namespaces/{kubectl.namespace}/basepools/shown/scale"
    assert json.loads(kubectl.ok("get", "--raw", path))["status"]["replicas"] == 2


def _undescribed(schema: dict[str, Any], at: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        if not field.get("description"):
            yield f"{at}.{name}"
        yield from _undescribed(field, f"{at}.{name}")
        yield from _undescribed(field.get("items", {}), f"{at}.{name}[]")


def test_every_served_field_is_described(kubectl: Kubectl) -> None:
    served = json.loads(kubectl.ok("get", "--raw", "/openapi/v3/apis/allele.dev/v1alpha1"))["components"]["schemas"]
    ours = {n.rsplit(".", 1)[1]: s for n, s in served.items() if n.startswith("dev.allele.")}
    assert set(SPECS) <= set(ours)
    missing = [h for kind in SPECS for h in _undescribed(ours[kind]["properties"]["spec"], f"{kind}.spec")]
    missing += [h for kind in SPECS for h in _undescribed(ours[kind]["properties"]["status"], f"{kind}.status")]
    assert missing == []


@pytest.mark.parametrize("kind", STATUSES)
def test_explain_knows_spec_and_status(kubectl: Kubectl, kind: str) -> None:
    short = STATUSES[kind][0]
    for part in ("spec", "status.conditions"):
        assert "DESCRIPTION" in kubectl.ok("explain", f"{short}.{part}")
