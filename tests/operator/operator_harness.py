"""A namespace, resources and an operator process for tests on the real API server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Obj = dict[str, Any]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
IMAGE = "localhost/allele-operator:dev"
PYTHON_IMAGE = "localhost/pybase:local"
BASE_DIGEST = "sha256:" + "0" * 64
API = "allele.dev/v1alpha1"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def until(what: str, look: Callable[[], Any], *, seconds: float = 60, detail: Callable[[], object] = str) -> Any:
    """The first true answer of `look`; what was seen instead is in the error."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}; found {found!r} {detail()}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Cluster:
    """kubectl, and the S3 server's address and credentials."""

    kubeconfig: Path
    environ: dict[str, str]

    @classmethod
    def of(cls, kubeconfig: Path) -> Cluster:
        """Reads the `env` file that the cluster's scripts leave beside the kubeconfig."""
        script = f"set -a; . {kubeconfig.parent / 'env'}; env -0"
        out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
        return cls(kubeconfig, dict(line.split("=", 1) for line in out.split("\0") if "=" in line))

    @property
    def s3(self) -> str:
        return self.environ["AWS_ENDPOINT_URL"]

    @property
    def host(self) -> str:
        """This machine's address as pods see it."""
        return str(urlsplit(self.s3).hostname)

    def run(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, env=self.environ)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def apply(self, *objects: Obj) -> None:
        self.run(
            "apply",
            "--server-side",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}),
        )

    def get(self, kind: str, name: str, *, namespace: str) -> Obj:
        """{} when there is none."""
        out = self.run("-n", namespace, "get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(out) if out else {}

    def items(self, kind: str, *, namespace: str, selector: str = "") -> list[Obj]:
        out = self.run("-n", namespace, "get", kind, "-o", "json", *(["-l", selector] if selector else []))
        return list(json.loads(out)["items"])


@dataclass
class Team:
    """A namespace of its own, with makers for each resource."""

    cluster: Cluster
    namespace: str
    bucket: str

    def apply(self, *objects: Obj) -> None:
        self.cluster.apply(*objects)

    def resource(self, kind: str, name: str, spec: Obj) -> Obj:
        return {"apiVersion": API, "kind": kind, "metadata": {"name": name, "namespace": self.namespace}, "spec": spec}

    def secret(self) -> Obj:
        keys = {k: self.cluster.environ[k] for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        head = {"name": "s3", "namespace": self.namespace}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": head, "stringData": keys}

    def store(self, name: str = "store") -> Obj:
        spec = {"bucket": self.bucket, "endpoint": self.cluster.s3, "credentials": {"secretName": "s3"}}
        return self.resource("AdapterStore", name, spec)

    def runtime(self, name: str = "runtime") -> Obj:
        images = dict.fromkeys(("trainer", "engine", "gateway", "driver"), PYTHON_IMAGE)
        small = {"requests": {"cpu": "1m"}}
        spec = {
            "images": images | {"pullPolicy": "Never"},
            "environment": {"claimName": "standins"},
            "resources": dict.fromkeys(("trainer", "engine", "gateway", "driver"), small),
            "sharedMemory": "1Mi",
        }
        return self.resource("AdapterRuntime", name, spec)

    def pool(self, name: str = "pool", **more: Any) -> Obj:
        spec = {
            "base": {"uri": "s3://bases/none", "digest": BASE_DIGEST},
            "runtimeRef": "runtime",
            "storeRef": "store",
            "trainer": {"slots": 4},
            "rollout": {"replicas": 1, "slots": 4},
        }
        return self.resource("BasePool", name, spec | more)

    def population(self, name: str = "population", **more: Any) -> Obj:
        groups = [{"name": "g", "members": {"count": 4}}]
        spec = {"base": {"digest": BASE_DIGEST}, "storeRef": "store", "groups": groups}
        return self.resource("AdapterPopulation", name, spec | more)

    def rl_run(self, name: str = "run", *, steps: int = 20, population: str = "population") -> Obj:
        group = {
            "select": {"group": "g"},
            "environment": {"path": "environment:None"},
            "optimizer": {"learningRate": 0.01},
        }
        spec = {"populationRef": population, "poolRef": "pool", "groups": [group], "stop": {"steps": steps}}
        return self.resource("RLRun", name, spec)

    def standins(self) -> list[Obj]:
        """A read-only claim on the folder with the roles' stand-ins."""
        size, name = {"storage": "1Mi"}, f"{self.namespace}-standins"
        mode = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
        volume = mode | {"capacity": size, "hostPath": {"path": str(HERE / "standins"), "type": "Directory"}}
        claim = mode | {"volumeName": name, "resources": {"requests": size}}
        head = {"name": "standins", "namespace": self.namespace}
        return [
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": head, "spec": claim},
        ]

    def get(self, kind: str, name: str) -> Obj:
        return self.cluster.get(kind, name, namespace=self.namespace)

    def items(self, kind: str, selector: str = "") -> list[Obj]:
        return self.cluster.items(kind, namespace=self.namespace, selector=selector)

    def condition(self, kind: str, name: str, type_: str) -> tuple[str, str, str]:
        """(status, reason, message); empty strings when it is not there."""
        found = self.get(kind, name).get("status", {}).get("conditions", [])
        c = next((c for c in found if c["type"] == type_), {})
        return c.get("status", ""), c.get("reason", ""), c.get("message", "")

    def until(
        self, kind: str, name: str, type_: str, *, status: str, reason: str = "", words: str = "", seconds: float = 60
    ) -> str:
        """Waits for a condition and gives its message."""

        def look() -> str:
            is_status, is_reason, message = self.condition(kind, name, type_)
            fits = is_status == status and (not reason or is_reason == reason) and words in message
            return message or "-" if fits else ""

        expected = f"{kind}/{name} {type_}={status} {reason} {words!r}"
        return str(until(expected, look, seconds=seconds, detail=lambda: self.get(kind, name).get("status")))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        return int(s.getsockname()[1])


@dataclass
class OperatorProcess:
    """`python -m allele_operator` (or another entry module) for one namespace."""

    team: Team
    log: Path
    entry: str = "allele_operator"
    lease: str = "operator"
    flags: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)

    def start(self) -> OperatorProcess:
        host = self.team.cluster.host
        flags = {
            "kubeconfig": self.team.cluster.kubeconfig,
            "namespace": self.team.namespace,
            "lease-namespace": self.team.namespace,
            "lease-name": self.lease,
            "listen": f"0.0.0.0:{self.port}",
            "advertise": f"{host}:{self.port}",
            "operator-url": f"http://{host}:{self.port}",
            "image": IMAGE,
            "image-pull-policy": "Never",
        }
        arguments = [a for k, v in flags.items() for a in (f"--{k}", str(v))]
        python_path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(HERE))))
        environ = os.environ | {"PYTHONPATH": python_path} | self.environ
        with self.log.open("a") as out:
            command = [sys.executable, "-m", self.entry, *arguments, *self.flags]
            self.process = subprocess.Popen(command, stderr=out, stdout=out, env=environ)
        return self

    def lines(self, message: str) -> list[Obj]:
        """Log records whose message contains the words."""
        if not self.log.exists():
            return []
        records = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [r for r in records if message in r["message"]]

    @property
    def leading(self) -> bool:
        return bool(self.lines("leading"))

    def wait_until_leading(self, seconds: float = 60) -> OperatorProcess:
        until("the operator leads", lambda: self.leading or self.dead, seconds=seconds, detail=self.tail)
        assert not self.dead, self.tail()
        return self

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def dies_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url("/metrics"), timeout=5) as answer:
            text = answer.read().decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}

    def writes(self, kind: str = "") -> float:
        """Writes so far, of one kind or of all but the lease."""
        name = "allele_operator_api_writes_total"
        found = {k: v for k, v in self.metrics().items() if k.startswith(name)}
        if kind:
            return found.get(f'{name}{{kind="{kind}"}}', 0.0)
        return sum(v for k, v in found.items() if 'kind="Lease"' not in k)

    def stop(self) -> int:
        if not self.dead:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def settled(operator: OperatorProcess, *, quiet: float, seconds: float = 60) -> float:
    """Waits until nothing was written for `quiet` seconds; gives the number of writes."""
    end, since, last = time.monotonic() + seconds, time.monotonic(), operator.writes()
    while time.monotonic() - since < quiet:
        assert time.monotonic() < end, f"writes go on: {operator.metrics()}"
        time.sleep(0.3)
        now = operator.writes()
        if now != last:
            since, last = time.monotonic(), now
    return last


def names(objects: list[Obj]) -> Iterator[str]:
    return (o["metadata"]["name"] for o in objects)
