"""What all tests share: markers by what a test uses, and the cluster's kubeconfig."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = {"kubeconfig": "cluster", "engine": "engine"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes a fixture of NEEDS, directly or not, gets its marker."""
    for item in items:
        for fixture, marker in NEEDS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """The kubeconfig of a running cluster. `make test` brings it up; a missing one is an error, never a skip."""
    path = Path(os.environ.get("ALLELE_KUBECONFIG", ROOT / "out/cluster/kubeconfig"))
    answer = subprocess.run(
        ["kubectl", "--kubeconfig", path, "get", "--raw", "/readyz"], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        pytest.fail(f"cluster: expected an API server at {path}, found: {answer.stderr.strip()}; run `make cluster`")
    return path
