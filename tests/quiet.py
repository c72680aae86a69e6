"""A cluster without the operator of the chart, which a demo may have left: it would write what a test writes."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

LABEL = "app.kubernetes.io/name=allele-operator"


@contextlib.contextmanager
def operators_stopped(kubeconfig: Path) -> Iterator[None]:
    """Scaled to nothing, and back afterwards."""

    def kubectl(*args: str) -> str:
        command = ["kubectl", "--kubeconfig", str(kubeconfig), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def scale(deployment: dict[str, dict[str, str]], replicas: object) -> None:
        head = deployment["metadata"]
        kubectl("-n", head["namespace"], "scale", "deployment", head["name"], f"--replicas={replicas}")

    installed = json.loads(kubectl("get", "deployment", "-A", "-l", LABEL, "-o", "json"))["items"]
    for deployment in installed:
        scale(deployment, 0)
    if installed:
        kubectl("wait", "--for=delete", "pod", "-A", "-l", LABEL, "--timeout=60s")
    try:
        yield
    finally:
        for deployment in installed:
            scale(deployment, deployment["spec"]["replicas"])
