"""What is rendered is what the API server takes: strictly, without a warning, in a namespace with PSA `restricted`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.api.kubectl import Kubectl
from tests.planning.test_golden import CASES, IDENTITY, pod_specs


@pytest.fixture(scope="module")
def restricted(kubeconfig: Path) -> Iterator[Kubectl]:
    namespace, outside = f"accepted-{uuid.uuid4().hex[:8]}", Kubectl(kubeconfig, "default")
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    head = {"name": namespace, "labels": labels}
    outside.ok("create", "-f=-", given={"apiVersion": "v1", "kind": "Namespace", "metadata": head})
    inside = Kubectl(kubeconfig, namespace)
    inside.ok("wait", "--for=create", "serviceaccount/default", "--timeout=30s")
    inside.ok("create", "serviceaccount", IDENTITY["serviceAccountName"])
    yield inside
    outside.ok("delete", "namespace", namespace, "--wait=false")


@pytest.mark.parametrize("name", [n for n in CASES if n != "own-pool"])
def test_the_api_server_takes_it_without_a_warning(restricted: Kubectl, name: str) -> None:
    manifests = yaml.safe_load(yaml.safe_dump(CASES[name]()))
    items = [m | {"metadata": m["metadata"] | {"namespace": restricted.namespace}} for m in manifests]
    answer = restricted.try_create({"apiVersion": "v1", "kind": "List", "items": items})
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.parametrize("name", [n for n in CASES if pod_specs(CASES[n]())])
def test_pod_security_admits_every_pod(restricted: Kubectl, name: str) -> None:
    for i, spec in enumerate(pod_specs(CASES[name]())):
        given = {k: v for k, v in spec.items() if k not in ("priorityClassName", "schedulerName")}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{i}"}, "spec": given}
        answer = restricted.try_create(pod)
        assert (answer.code, answer.err) == (0, "")
