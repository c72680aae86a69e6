"""The demo on Kubernetes: chart, example, wait, evaluate; every step is a command that a user could type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import boto3
import yaml

from allele.store.population import PopulationStore
from allele_cli.base import put_base
from allele_cli.failure import Failure
from allele_cli.watch import watch
from hack.demo.summary import EXAMPLE, POPULATION, ROOT, Seconds, conclude, evaluate

NAMESPACE = "allele-demo"
SYSTEM = "allele-system"
POOL = "tiny"
RUN = "preferences"


def demo(*, existing: bool, seconds: Seconds) -> None:
    install_chart()
    prepare_namespace(environment=not existing)
    store = fill_store()
    started = time.monotonic()
    kubectl("apply", "--namespace", NAMESPACE, "--filename", str(EXAMPLE))
    print(f"\nkubectl -n {NAMESPACE} get ast,art,bp,apop,rlr")
    watch(RUN, namespace=NAMESPACE)
    elapsed = time.monotonic() - started
    endpoint = service_url(POOL)
    result = evaluate(endpoint, base_model=POOL)
    seconds.start = elapsed
    conclude(store, result, seconds=seconds, mode="cluster")
    suggest(endpoint)


def install_chart() -> None:
    say("helm upgrade --install allele charts/allele")
    run(
        "helm", "upgrade", "--install", "allele", str(ROOT / "charts/allele"),
        "--namespace", SYSTEM, "--create-namespace", "--values", str(ROOT / "hack/demo/values.yaml"),
        *build_annotation(), "--wait", "--timeout", "3m",
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


def fill_store() -> PopulationStore:
    """The bucket, with the base in it. Credentials and endpoint are those of the example's AdapterStore."""
    secret, spec = store_objects()
    os.environ |= secret["stringData"] | {
        "AWS_ENDPOINT_URL": spec["endpoint"],
        "AWS_REGION": spec.get("region", "us-east-1"),
        "AWS_ALLOW_HTTP": "true",
    }
    client = boto3.client("s3", region_name=os.environ["AWS_REGION"])
    if spec["bucket"] not in {b["Name"] for b in client.list_buckets()["Buckets"]}:
        say(f"bucket {spec['bucket']} at {spec['endpoint']}")
        client.create_bucket(Bucket=spec["bucket"])
    (pool,) = yaml.safe_load_all((EXAMPLE / "03-pool.yaml").read_text())
    say(f"allele base put examples/preferences/base --to {pool['spec']['base']['uri']}")
    digest = put_base(EXAMPLE / "base", uri=pool["spec"]["base"]["uri"])
    if digest != pool["spec"]["base"]["digest"]:
        raise Failure(f"base: expected {pool['spec']['base']['digest']} as in 03-pool.yaml, found {digest}")
    url = f"s3://{spec['bucket']}/{spec.get('prefix', '')}".rstrip("/")
    return PopulationStore.open(url, namespace=NAMESPACE, population=POPULATION)


def store_objects() -> tuple[dict[str, Any], dict[str, Any]]:
    objects = {o["kind"]: o for o in yaml.safe_load_all((EXAMPLE / "01-store.yaml").read_text()) if o}
    return objects["Secret"], objects["AdapterStore"]["spec"]


def service_url(name: str) -> str:
    service = json.loads(kubectl("get", "service", name, "--namespace", NAMESPACE, "--output", "json"))
    port = service["spec"]["ports"][0]["port"]
    return f"http://{service['spec']['clusterIP']}:{port}"


def suggest(endpoint: str) -> None:
    member = f"{POPULATION}/taste-0003"
    body = json.dumps({"model": member, "messages": [{"role": "user", "content": "kbdac="}], "max_tokens": 8})
    print(
        f"""
Try next (the pool stays up; `make down` removes everything):
  export KUBECONFIG={os.environ["KUBECONFIG"]} PATH={Path(sys.executable).parent}:$PATH
  kubectl -n {NAMESPACE} get ast,art,bp,apop,rlr
  allele lineage {member} -n {NAMESPACE}
  curl -s {endpoint}/v1/chat/completions -H 'content-type: application/json' -d '{body}'
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
