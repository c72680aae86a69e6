"""The demo, run once a session on the cluster and once without, and ways to look at what it left."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples/preferences"
NAMESPACE = "allele-demo"


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a demo printed and wrote."""

    output: str
    summary: dict[str, Any]


def run_demo(mode: str, **environ: str) -> Demo:
    """Raises CalledProcessError's text as a test failure when the demo fails."""
    command = [sys.executable, ROOT / "hack/demo/main.py", "--mode", mode]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"demo {mode} failed:\n{done.stdout}\n{done.stderr}"
    return Demo(done.stdout, json.loads((ROOT / "out/demo/summary.json").read_text()))


@pytest.fixture(scope="session")
def cluster_demo(kubeconfig: Path) -> Demo:
    return run_demo("cluster", KUBECONFIG=str(kubeconfig))


@pytest.fixture(scope="session")
def kubectl(kubeconfig: Path):  # type: ignore[no-untyped-def]
    def run(*args: str, namespace: str = NAMESPACE, stdin: str | None = None) -> str:
        command = ["kubectl", "--kubeconfig", str(kubeconfig), "--namespace", namespace, *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def allele(kubeconfig: Path):  # type: ignore[no-untyped-def]
    """The command line, in the demo's namespace."""

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "allele_cli", *args, "--namespace", NAMESPACE]
        environ = os.environ | {"KUBECONFIG": str(kubeconfig)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
        return done.stdout

    return run
