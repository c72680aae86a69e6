"""The chart as Helm renders it."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import yaml

from tests.operator.operator_harness import ROOT

CHART = ROOT / "charts/allele"


class Yaml12(yaml.SafeLoader):
    """Reads 1e-05 as the number that it is to Kubernetes; PyYAML follows YAML 1.1, where it is a string."""


Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+e[-+]?\d+$"), list("-+0123456789"))


def render(helm: str, *values: str, namespace: str = "allele-system") -> list[dict[str, Any]]:
    sets = [a for v in values for a in ("--set", v)]
    command = [helm, "template", "allele", str(CHART), "--namespace", namespace, *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [o for o in yaml.load_all(done.stdout, Yaml12) if o]


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [o for o in objects if o["kind"] in kinds]
