"""What may be changed after it was applied, and what may not: real objects, real patches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.kubectl import Kubectl
from tests.api.manifests import SPECS, TRAIN, manifest

OTHER = "sha256:" + "b" * 64
GROUP = {"name": "g", "members": {"count": 16}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("AdapterStore", {"bucket": "other"}, "bucket is immutable: create another AdapterStore"),
    ("AdapterStore", {"prefix": "other"}, "prefix is immutable: create another AdapterStore"),
    ("AdapterStore", {"provider": "GCS"}, "provider is immutable: create another AdapterStore"),
    ("BasePool", {"base": {"digest": OTHER}}, "base is immutable: create another pool"),
    ("BasePool", {"storeRef": "other"}, "storeRef is immutable: create another pool"),
    ("BasePool", {"trainer": None}, "trainer cannot be added or removed: create another pool"),
    ("AdapterPopulation", {"base": {"digest": OTHER}}, "base is immutable: create another population"),
    ("AdapterPopulation", {"storeRef": "other"}, "storeRef is immutable: create another population"),
    (
        "AdapterPopulation",
        {"groups": [{**GROUP, "name": "h"}]},
        "a group cannot be removed or renamed: its revisions are kept",
    ),
    (
        "AdapterPopulation",
        {"groups": [{**GROUP, "adapter": {"rank": 16}}]},
        "the adapter of a group is immutable: add another group",
    ),
    *(
        ("RLRun", change, "a run is immutable but for stop and suspend: create another run")
        for change in (
            {"populationRef": "other"},
            {"poolRef": "other"},
            {"poolRef": None, "runtimeRef": "rt", "baseUri": "s3://b/x"},
            {"groups": [{**TRAIN, "select": {"group": "h"}}]},
            {"pace": {"cohort": 3}},
            {"checkpoints": {"everySteps": 9}},
            {"startFrom": {"revision": "Base"}},
            {"evaluation": {"prompts": 1}},
            {"failurePolicy": {"backoffLimit": 1}},
            {"code": {"configMap": "c"}},
        )
    ),
]
ALLOWED: list[tuple[str, dict[str, Any]]] = [
    ("AdapterStore", {"endpoint": "https://s3.example.com", "credentials": {"secretName": "other"}}),
    ("AdapterRuntime", {"images": {"trainer": "trainer:2"}}),
    ("BasePool", {"suspend": True, "runtimeRef": "rt2", "trainer": {"slots": 32}}),
    (
        "AdapterPopulation",
        {"groups": [{**GROUP, "members": {"count": 32}}, {"name": "h", "members": {"count": 1}}]},
    ),
    ("AdapterPopulation", {"deletionPolicy": "Delete", "retention": {"schedule": "17 3 * * *"}}),
    ("RLRun", {"suspend": True, "stop": {"steps": 80, "reward": 0.9}}),
]


@pytest.fixture(scope="module", autouse=True)
def _objects(kubectl: Kubectl) -> None:
    for kind in SPECS:
        kubectl.ok("apply", "--server-side", "-f=-", given=manifest(kind, name="changes"))


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_what_is_fixed_cannot_be_changed(kubectl: Kubectl, kind: str, change: dict[str, Any], message: str) -> None:
    answer = kubectl.patch(kind, "changes", {"spec": change})
    assert answer.code != 0, "accepted"
    assert message in answer.err


@pytest.mark.parametrize(("kind", "change"), ALLOWED)
def test_what_is_open_can_be_changed(kubectl: Kubectl, kind: str, change: dict[str, Any]) -> None:
    kubectl.ok("apply", "--server-side", "--force-conflicts", "-f=-", given=manifest(kind, name="open"))
    answer = kubectl.patch(kind, "open", {"spec": change})
    assert answer.code == 0, answer.err


def test_a_pool_scales_like_a_deployment(kubectl: Kubectl) -> None:
    kubectl.ok("apply", "--server-side", "--force-conflicts", "-f=-", given=manifest("BasePool", name="scaled"))
    kubectl.ok("scale", "bp", "scaled", "--replicas=3")
    assert kubectl.ok("get", "bp", "scaled", "-o=jsonpath={.spec.rollout.replicas}") == "3"


def test_defaults_are_in_the_stored_object(kubectl: Kubectl) -> None:
    spec = json.loads(kubectl.ok("get", "rlr", "changes", "-o=json"))["spec"]
    assert spec["pace"] == {"maxPolicyLag": 0}
    assert spec["groups"][0]["algorithm"] == {"name": "GRPO", "promptsPerStep": 4}
    assert spec["checkpoints"] == {"everySteps": 1}
    assert "code" not in spec
    pool = json.loads(kubectl.ok("get", "bp", "changes", "-o=json"))["spec"]
    assert pool["rollout"] == {"replicas": 1, "slots": 16}
    assert pool["adapters"]["targets"][0] == "q_proj"
    store = json.loads(kubectl.ok("get", "ast", "changes", "-o=json"))["spec"]
    assert (store["provider"], store["prefix"]) == ("S3", "")


def test_status_is_written_apart(kubectl: Kubectl) -> None:
    kubectl.ok("patch", "rlr", "changes", "--type=merge", "--patch", '{"status":{"phase":"Forged"}}')
    assert kubectl.ok("get", "rlr", "changes", "-o=jsonpath={.status.phase}") == ""
