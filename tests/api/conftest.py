"""A real API server with our definitions, reached as a user does: by kubectl."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.kubectl import Kubectl
from tests.quiet import operators_stopped

CRDS = Path(__file__).parents[2] / "crds"


@pytest.fixture(scope="package")
def definitions(kubeconfig: Path) -> Iterator[Path]:
    """The kubeconfig of a cluster that has our definitions as the folder crds/ says, and nobody who acts on them."""
    kubectl = Kubectl(kubeconfig, "default")
    kubectl.ok("apply", "--server-side", "--force-conflicts", "--validate=strict", f"--filename={CRDS}")
    kubectl.ok("wait", "--for=condition=Established", "--timeout=30s", f"--filename={CRDS}")
    with operators_stopped(kubeconfig):
        yield kubeconfig


@pytest.fixture(scope="package")
def kubectl(definitions: Path) -> Iterator[Kubectl]:
    """In a namespace of its own."""
    namespace = f"api-{uuid.uuid4().hex[:8]}"
    outside = Kubectl(definitions, "default")
    outside.ok("create", "namespace", namespace)
    yield Kubectl(definitions, namespace)
    outside.ok("delete", "namespace", namespace, "--wait=false")
