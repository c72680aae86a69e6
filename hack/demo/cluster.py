"""The demo on Kubernetes: chart, example, wait, evaluate; every step is a command that a user could type."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import yaml

from allele.store.population import PopulationStore
from allele_cli.base import put_base
from allele_cli.failure import Failure
from allele_cli.watch import watch
from hack.demo import target
from hack.demo.summary import EXAMPLE, POPULATION, ROOT, Seconds, conclude, evaluate
from hack.demo.target import Target

NAMESPACE = "allele-demo"
SYSTEM = "allele-system"
POOL = "tiny"
RUN = "preferences"


def demo(*, existing: bool, seconds: Seconds) -> None:
    where = target.existing(os.environ) if existing else target.local()
    install_chart(where)
    prepare_namespace(environment=not existing)
    store = fill_store(where)
    started = time.monotonic()
    say("kubectl apply: store, runtime, pool, population, run")
    apply([{**o, "metadata": {**o["metadata"], "namespace": NAMESPACE}} for o in where.objects.values()])
    print(f"\nkubectl -n {NAMESPACE} get ast,art,bp,apop,rlr")
    watch(RUN, namespace=NAMESPACE)
    seconds.start = time.monotonic() - started
    with endpoint(POOL, forward=existing) as url:
        result = evaluate(url, base_model=POOL)
        conclude(store, result, seconds=seconds, mode="cluster")
    suggest(None if existing else url)


def install_chart(where: Target) -> None:
    say("helm upgrade --install allele charts/allele")
    sets = [f"--set-string={k}={v}" for k, v in where.chart.items()]
    run(
        "helm", "upgrade", "--install", "allele", str(ROOT / "charts/allele"),
        "--namespace", SYSTEM, "--create-namespace", "--take-ownership", "--force-conflicts",
        *sets, *build_annotation(), "--wait", "--timeout", "3m",
    )  # fmt: skip


def build_annotation() -> list[str]:
    """A rebuilt image has the same tag: the annotation makes the Deployment roll."""
    built = ROOT / "out/cluster/built/allele-operator:dev"
    return ["--set-string", f"podAnnotations.build={built.read_text().strip()}"] if built.exists() else []


def prepare_namespace(*, environment: bool) -> None:
    """A namespace that enforces PSA restricted, the user's code, and for development the mounted environment."""
    say(f"namespace {NAMESPACE}, the example's code")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "preferences-code", "namespace": NAMESPACE},
            "data": {"environment.py": (EXAMPLE / "environment.py").read_text()},
        },
    ]
    if environment:
        objects += environment_volume(Path(sysconfig.get_path("purelib")))
    apply(objects)


def environment_volume(site_packages: Path) -> list[dict[str, Any]]:
    """A read-only claim on this checkout's site-packages: 6 GB that no image has to carry."""
    spec: dict[str, Any] = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    size = {"storage": "10Gi"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "allele-env"},
            "spec": spec
            | {
                "capacity": size,
                "hostPath": {"path": str(site_packages), "type": "Directory"},
                "claimRef": {"namespace": NAMESPACE, "name": "allele-env"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "allele-env", "namespace": NAMESPACE},
            "spec": spec | {"volumeName": "allele-env", "resources": {"requests": size}},
        },
    ]


def fill_store(where: Target) -> PopulationStore:
    """The bucket, with the base in it. Credentials and endpoint are those that the pods get."""
    os.environ |= where.store_environment
    spec, base = where.objects["AdapterStore"]["spec"], where.objects["BasePool"]["spec"]["base"]
    client = boto3.client("s3", region_name=os.environ["AWS_REGION"])
    if spec["bucket"] not in {b["Name"] for b in client.list_buckets()["Buckets"]}:
        say(f"bucket {spec['bucket']}")
        client.create_bucket(Bucket=spec["bucket"])
    say(f"allele base put examples/preferences/base --to {base['uri']}")
    digest = put_base(EXAMPLE / "base", uri=base["uri"])
    if digest != base["digest"]:
        raise Failure(f"base: expected {base['digest']} as in 03-pool.yaml, found {digest}")
    url = f"s3://{spec['bucket']}/{spec.get('prefix', '')}".rstrip("/")
    return PopulationStore.open(url, namespace=NAMESPACE, population=POPULATION)


@contextlib.contextmanager
def endpoint(pool: str, *, forward: bool) -> Iterator[str]:
    """URL of the pool's gateway from here: the Service's address on our own node, else a forwarded port."""
    if not forward:
        service = json.loads(kubectl("get", "service", pool, "--namespace", NAMESPACE, "--output", "json"))
        yield f"http://{service['spec']['clusterIP']}"
        return
    command = ["kubectl", "port-forward", "--namespace", NAMESPACE, f"service/{pool}", ":80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
        assert forwarding.stdout is not None
        line = forwarding.stdout.readline()  # Forwarding from 127.0.0.1:45678 -> 8000
        if "127.0.0.1:" not in line:
            raise Failure(f"{' '.join(command)}: expected a forwarded port, found {line!r}")
        try:
            yield f"http://{line.split()[2]}"
        finally:
            forwarding.terminate()


def suggest(url: str | None) -> None:
    member = f"{POPULATION}/taste-0003"
    body = json.dumps({"model": member, "messages": [{"role": "user", "content": "kbdac="}], "max_tokens": 8})
    shell = f". {ROOT / 'out/cluster/env'}; " if url else ""
    forward = "" if url else f"  kubectl -n {NAMESPACE} port-forward service/{POOL} 8080:80 &\n"
    print(
        f"""
Try next (the pool stays up; `make down` removes everything):
  {shell}export PATH={Path(sys.executable).parent}:$PATH
  kubectl -n {NAMESPACE} get ast,art,bp,apop,rlr
  allele lineage {member} -n {NAMESPACE}
{forward}  curl -s {url or "http://127.0.0.1:8080"}/v1/chat/completions -H 'content-type: application/json' -d '{body}'
"""
    )


def apply(objects: list[dict[str, Any]]) -> None:
    text = yaml.safe_dump_all(objects)
    command = ["kubectl", "apply", "--filename", "-"]
    answer = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise Failure(f"{' '.join(command)}: {answer.stderr.strip()}")


def kubectl(*args: str) -> str:
    return run("kubectl", *args)


def run(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise Failure(f"{' '.join(command)}: {(answer.stderr or answer.stdout).strip()}")
    return answer.stdout


def say(text: str) -> None:
    print(f"· {text}", file=sys.stderr)
