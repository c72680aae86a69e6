"""What all tests share: markers by what a test uses, and the cluster's kubeconfig."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVERS = {"s3", "gs", "az"}
NEEDS = {"kubeconfig": "cluster", "engine": "engine", "moe_engine": "engine", "gateway": "engine"}
SLOW = (
    "trainer/",  # imports torch and Megatron, a minute in all
    "cli/test_bad_input",  # a process of its own for each case
    "format/test_peft_folder",  # imports torch
    "format/test_round_trips",  # thousands of examples
    "store/test_capability",
    "store/test_crash_at_every_write",
    "store/test_faults",
    "store/test_writers_at_once",
    "store/test_credentials",
    "planning/test_admission",
    "planning/test_convergence",
)
"""Files below tests/ that are left to `make test`."""


def pytest_configure(config: pytest.Config) -> None:
    """Only tests marked gpu compute on one: the others hold for the bits of a CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes a fixture of NEEDS, directly or not, gets its marker; so do SLOW files and tests of SERVERS."""
    for item in items:
        over_server = SERVERS.intersection(item.name.partition("[")[2].removesuffix("]").split("-"))
        if over_server or item.path.relative_to(ROOT / "tests").as_posix().startswith(SLOW):
            item.add_marker("slow")
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
