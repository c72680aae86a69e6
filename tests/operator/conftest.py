"""Fixtures of the operator's tests on a real cluster."""

from __future__ import annotations

import itertools
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from tests.operator.operator_harness import RESTRICTED, ROOT, Cluster, OperatorProcess, Team
from tests.quiet import operators_stopped

StartOperator = Callable[..., OperatorProcess]


HELM_LABEL = "app.kubernetes.io/managed-by=Helm"
HELM_RELEASE = ("meta.helm.sh/release-name=allele", "meta.helm.sh/release-namespace=allele-system")
"""Marks by which a later installation of the chart takes the definitions over."""


@pytest.fixture(scope="package")
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """The cluster with the definitions of this checkout; an operator of the chart would interfere and is stopped."""
    found = Cluster.of(kubeconfig)
    crds = ("-f", str(ROOT / "crds"))
    found.run("apply", "--server-side", "--force-conflicts", *crds)
    found.run("label", "--overwrite", *crds, HELM_LABEL)
    found.run("annotate", "--overwrite", *crds, *HELM_RELEASE)
    found.run("wait", "--for=condition=Established", *crds, "--timeout=30s")
    with operators_stopped(kubeconfig):
        yield found


@pytest.fixture(scope="package")
def s3(cluster: Cluster) -> Any:
    e = cluster.environ
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3,
        region_name="us-east-1",
        aws_access_key_id=e["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=e["AWS_SECRET_ACCESS_KEY"],
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )


@pytest.fixture(scope="package")
def helm() -> str:
    script = ". hack/cluster/env.sh && echo $(tool helm)/helm"
    path = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).exists():
        pytest.fail(f"helm: expected {path}; run `make cluster`")
    return path


@pytest.fixture
def team(cluster: Cluster) -> Iterator[Team]:
    """A fresh namespace that enforces PSA restricted; the bucket of its store does not exist."""
    name = f"op-{uuid.uuid4().hex[:8]}"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})
    yield Team(cluster, name, bucket=name)
    for kind in ("rlrun", "apop"):  # nobody is left to give the members back, or to erase
        for obj in cluster.items(kind, namespace=name):
            patch = '{"metadata": {"finalizers": null}}'
            cluster.run("-n", name, "patch", kind, obj["metadata"]["name"], "--type=merge", "-p", patch, check=False)
    cluster.run("delete", "namespace", name, "--ignore-not-found", "--wait=false")
    cluster.run("delete", "pv", f"{name}-standins", "--ignore-not-found", "--wait=false")


@pytest.fixture
def ready_team(team: Team, s3: Any) -> Team:
    """With store, runtime, secret, bucket and stand-ins, so that pools come up."""
    s3.create_bucket(Bucket=team.bucket)
    team.apply(*team.standins(), team.secret(), team.store(), team.runtime())
    return team


@pytest.fixture
def operators(tmp_path: Path) -> Iterator[StartOperator]:
    """Starts operators; all are killed at the end."""
    count, started = itertools.count(), []

    def start(team: Team, **options: Any) -> OperatorProcess:
        process = OperatorProcess(team, tmp_path / f"operator-{next(count)}.log", **options).start()
        started.append(process)
        return process

    yield start
    for process in started:
        if not process.dead:
            process.kill()
