"""A projection keeps what explains an object and drops the rest."""

from __future__ import annotations

import json

from allele_operator.planning.observe import project
from allele_operator.planning.pods import trouble

POD = {
    "metadata": {
        "name": "p",
        "namespace": "ns",
        "uid": "u",
        "resourceVersion": "7",
        "labels": {"allele.dev/role": "driver"},
        "annotations": {"cni": "x" * 500},
        "managedFields": [{"manager": "kubelet"}],
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "uj", "controller": True}],
    },
    "spec": {"nodeName": "n1", "containers": [{"name": "driver", "env": [{"name": "A", "value": "x" * 500}]}]},
    "status": {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "False"}, {"type": "PodScheduled", "status": "True"}],
        "initContainerStatuses": [
            {"name": "base", "ready": True, "restartCount": 0, "state": {"terminated": {"exitCode": 0}}}
        ],
        "containerStatuses": [
            {
                "name": "driver",
                "ready": False,
                "restartCount": 2,
                "imageID": "sha256:" + "0" * 64,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}},
                "lastState": {"terminated": {"exitCode": 2, "reason": "Error", "message": "m" * 9000}},
            }
        ],
    },
}


def test_a_pod_becomes_small_and_still_explains_itself() -> None:
    slim = project("Pod", POD)
    assert (slim["kind"], slim["apiVersion"]) == ("Pod", "v1"), "items of a list lack both"
    assert slim["metadata"]["annotations"] == {}
    assert slim["metadata"]["ownerReferences"] == [{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "uj"}]
    assert "managedFields" not in slim["metadata"]
    base, driver = slim["status"]["containers"]
    assert (base["init"], base["terminated"]) == (True, {"exitCode": 0})
    assert driver["last"]["exitCode"] == 2
    assert len(driver["last"]["message"]) == 4096, "what kubelet keeps: a probe's JSON must stay whole"
    found = trouble([slim])
    assert found is not None
    assert found.reason == "CrashLoop"


def test_our_own_kinds_keep_spec_and_status_but_not_what_kubectl_left() -> None:
    raw = {
        "metadata": {
            "name": "r",
            "namespace": "ns",
            "uid": "u",
            "resourceVersion": "1",
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "note": "kept"},
        },
        "spec": {"populationRef": "p"},
    }
    slim = project("RLRun", raw)
    assert slim["metadata"]["annotations"] == {"note": "kept"}
    assert slim["spec"] == {"populationRef": "p"}
    assert slim["status"] == {}
    assert slim["metadata"]["finalizers"] == []


def test_a_config_map_is_kept_without_its_data() -> None:
    raw = {
        "metadata": {"name": "c", "namespace": "ns", "uid": "u", "annotations": {"allele.dev/applied": "abc"}},
        "data": {"run.json": "x" * 100_000},
    }
    slim = project("ConfigMap", raw)
    assert slim["metadata"]["annotations"] == {"allele.dev/applied": "abc"}
    assert len(json.dumps(slim)) < 400


def test_a_pod_on_its_way_out_is_no_trouble() -> None:
    leaving = {**POD, "metadata": {**POD["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    assert trouble([project("Pod", leaving)]) is None
