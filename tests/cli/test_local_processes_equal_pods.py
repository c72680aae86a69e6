"""Local mode runs what the operator renders: argv and environment differ by addresses and nothing else."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from allele_cli.local import make_plan
from allele_cli.local.pods import INHERITED, Addresses, localise
from allele_cli.local.session import Ports, driver_parts, local_pods, pool_parts, store_access
from allele_operator.planning.render.driver import driver_pod
from allele_operator.planning.render.pool import rollout_pod, trainer_pod

EXAMPLE = Path(__file__).parent.parent.parent / "examples/preferences"
PORTS = Ports(trainer=41001, engine=41002, tenant=41003, internal=41004, report=41005)

ADDRESS = re.compile(
    r"https?://[\w.-]+:\d+|\d+\.\d+\.\d+\.\d+:\d+|(?<![\w.])/(?!/)[\w./-]+|^python3$|^(30000|41002)$|^\d+\.\d+\.\d+\.\d+$"
)
"""What may differ: an URL's host and port, a socket, an absolute path, the interpreter, the engine's port."""


@pytest.fixture
def plan(tmp_path: Path):
    return make_plan(
        [EXAMPLE / "04-population.yaml", EXAMPLE / "05-run.yaml"],
        base=EXAMPLE / "base",
        code=EXAMPLE,
        runtime=EXAMPLE / "02-runtime.yaml",
        out=tmp_path,
    )


def shape(text: str) -> str:
    """The text with every address replaced by one mark."""
    return ADDRESS.sub("<address>", text)


def test_argv_and_environment_equal_but_for_addresses(plan) -> None:
    rendered = {
        "trainer": trainer_pod(pool_parts(plan)),
        "rollout": rollout_pod(pool_parts(plan)),
        "driver": driver_pod(driver_parts(plan)),
    }
    local = local_pods(plan, PORTS, token="t")
    compared = 0
    for name, pod in rendered.items():
        containers = [*pod.get("initContainers", ()), *pod["containers"]]
        processes = [*local[name].inits, *local[name].containers]
        for container, process in zip(containers, processes, strict=True):
            assert [shape(a) for a in process.argv] == [shape(a) for a in container["command"]]
            own = {k: v for k, v in process.env.items() if k not in INHERITED}
            assert {k: shape(v) for k, v in own.items()} == {
                e["name"]: shape(e["value"]) for e in container["env"] if "value" in e
            }
            assert process.argv[0] == sys.executable
            compared += 1
    assert compared == 6


def test_no_address_of_the_cluster_is_left(plan) -> None:
    for pod in local_pods(plan, PORTS, token="t").values():
        for process in (*pod.inits, *pod.containers):
            text = " ".join([*process.argv, *(v for k, v in process.env.items() if k not in INHERITED)])
            assert "/allele/" not in text.replace(str(plan.out), "").replace(str(EXAMPLE), "").replace(sys.prefix, "")
            assert ".svc" not in text and "0.0.0.0" not in text


def test_nothing_of_our_own_environment_leaks_in(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLELE_SECRET_OF_MINE", "x")
    for pod in local_pods(plan, PORTS, token="t").values():
        assert all("ALLELE_SECRET_OF_MINE" not in p.env for p in (*pod.inits, *pod.containers))
    assert "ALLELE_SECRET_OF_MINE" in os.environ


def test_rendered_run_file_is_the_operators(plan) -> None:
    from allele_operator.planning.render.driver import run_json

    local_pods(plan, PORTS, token="t")
    assert (plan.out / "driver/run/run.json").read_text() == run_json(driver_parts(plan).bundle)


def test_a_bucket_is_reached_by_our_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    access = store_access("gs://bucket/prefix")
    pod = {"containers": [{"name": "c", "command": ["x"], "env": list(access.env)}]}
    none = Addresses(paths={}, hosts={}, words={})
    (process,) = localise(pod, name="p", root=Path("/tmp"), addresses=none, given={}, restarts=0).containers
    assert access.url == "gs://bucket/prefix"
    assert process.env["GOOGLE_APPLICATION_CREDENTIALS"] == "/home/me/key.json"
    assert "SOMETHING_ELSE" not in process.env
    assert store_access("file:///dir").env == ()
