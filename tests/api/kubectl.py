"""kubectl as a test uses it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Kubectl:
    """kubectl against one cluster and namespace."""

    kubeconfig: Path
    namespace: str

    def __call__(self, *words: str, given: Any = None) -> Answer:
        run = subprocess.run(
            ["kubectl", f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *words],
            input=None if given is None else json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
        )
        return Answer(run.returncode, run.stdout, run.stderr)

    def ok(self, *words: str, given: Any = None) -> str:
        answer = self(*words, given=given)
        assert answer.code == 0, answer.err
        return answer.out

    def try_create(self, manifest: Any) -> Answer:
        """What the API server says to a new object, without making it."""
        return self("create", "--dry-run=server", "--validate=strict", "-o=json", "-f=-", given=manifest)

    def patch(self, kind: str, name: str, patch: Any) -> Answer:
        return self("patch", kind, name, "--type=merge", "--patch", json.dumps(patch))
