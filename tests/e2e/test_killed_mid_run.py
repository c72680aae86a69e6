"""SIGKILL of the trainer and of the driver in the middle of a run: it finishes, nothing is lost or repeated."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from allele.store.population import PopulationStore
from tests.e2e.conftest import EXAMPLE, NAMESPACE, Demo

pytestmark = pytest.mark.timeout(900)
STEPS = 16
Kubectl = Callable[..., str]


@pytest.fixture
def run_name(kubectl: Kubectl, cluster_demo: Demo) -> Iterator[str]:
    """A population of four and a run of it in the demo's pool."""
    name = f"killed-{time.time_ns() % 10**8}"
    population, run = (yaml.safe_load((EXAMPLE / f).read_text()) for f in ("04-population.yaml", "05-run.yaml"))
    population["metadata"]["name"] = run["metadata"]["name"] = run["spec"]["populationRef"] = name
    population["spec"]["groups"][0]["members"]["count"] = 4
    run["spec"]["stop"]["steps"] = STEPS
    run["spec"]["evaluation"] = {"prompts": 0}
    kubectl("apply", "--filename", "-", stdin=yaml.safe_dump_all([population, run]))
    yield name
    kubectl("delete", "rlrun", name, "--wait=true", "--timeout=60s")
    kubectl("delete", "adapterpopulation", name)


def status(kubectl: Kubectl, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kubectl("get", "rlrun", run, "--output", "json")).get("status", {})
    return found


def store_of(run: str) -> PopulationStore:
    """The demo has put the store's credentials into its own environment; here they come from the example."""
    secret, store = yaml.safe_load_all((EXAMPLE / "01-store.yaml").read_text())
    environ = secret["stringData"] | {
        "AWS_ENDPOINT_URL": store["spec"]["endpoint"],
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    url = f"s3://{store['spec']['bucket']}"
    return PopulationStore.open(url, namespace=NAMESPACE, population=run, environ=environ)


def committed_step(run: str) -> int:
    """Last committed step as the catalogue says it; the status may be ten seconds behind."""
    try:
        facts = list(store_of(run).catalogue.facts())
    except Exception:
        return -1
    return max((f.step for f in facts if f.kind == "Committed" and f.step is not None), default=-1)


def wait_for(what: str, found: Callable[[], bool], *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.3)


def restarts(kubectl: Kubectl, selector: str, container: str) -> int:
    pods = json.loads(kubectl("get", "pods", "--selector", selector, "--output", "json"))["items"]
    counts = [
        s["restartCount"] for p in pods for s in p["status"].get("containerStatuses", ()) if s["name"] == container
    ]
    assert counts, f"no container {container} in pods of {selector}"
    return sum(counts)


def kill(module: str, *words: str) -> None:
    """SIGKILL of the one pod process that runs `python3 -m module` with these words in its arguments or environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            text = (entry / "cgroup").read_text()
            mounts = (entry / "mountinfo").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if argv[1:3] == [b"-m", module.encode()] and "/allele/" in text and all(w in mounts for w in words):
            os.kill(int(entry.name), signal.SIGKILL)
            return
    pytest.fail(f"no pod process runs {module} with {words}")


def assert_nothing_lost_or_repeated(run: str, seen: list[tuple[str, int, str]]) -> None:
    facts = list(store_of(run).catalogue.facts())
    committed = [f for f in facts if f.kind == "Committed"]
    counts = Counter((f.member, f.revision) for f in committed)
    assert max(counts.values()) == 1, counts.most_common(3)
    assert sorted({f.step for f in committed}) == list(range(STEPS + 1))
    for member in {f.member for f in committed}:
        mine = sorted((f.revision or 0) for f in committed if f.member == member)
        assert mine == list(range(1, len(mine) + 1))
    now = {(f.member, f.revision, f.digest) for f in committed}
    assert set(seen) <= now, "a revision that was committed before the kill is gone or has other bytes"


@pytest.mark.parametrize("role", ["trainer", "driver"])
def test_run_finishes_and_keeps_every_commit(role: str, run_name: str, kubectl: Kubectl) -> None:
    selector = "allele.dev/pool=tiny,allele.dev/role=trainer" if role == "trainer" else f"allele.dev/run={run_name}"
    wait_for("a third of the steps", lambda: committed_step(run_name) >= STEPS // 3, seconds=300)
    before = restarts(kubectl, selector, role)
    uid = json.loads(kubectl("get", "pods", "--selector", selector, "--output", "json"))["items"][0]["metadata"]["uid"]
    seen = [
        (f.member, f.revision or 0, f.digest or "")
        for f in store_of(run_name).catalogue.facts()
        if f.kind == "Committed"
    ]
    killed_at = committed_step(run_name)
    kill(f"allele_{role}", uid)
    assert 0.2 * STEPS <= killed_at <= 0.8 * STEPS
    wait_for("a restart", lambda: restarts(kubectl, selector, role) > before, seconds=120)
    wait_for("the end", lambda: status(kubectl, run_name).get("phase") in ("Succeeded", "Failed"), seconds=400)
    assert status(kubectl, run_name)["phase"] == "Succeeded"
    assert_nothing_lost_or_repeated(run_name, seen)
