"""The processes that a driver needs, as real ones on free ports, and what is left of a run in the store."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from allele.protocol.bundle import RunBundle
from allele.protocol.progress import Progress
from allele.store import Fact, PopulationStore
from allele.store.bases import digest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/preferences"
BASE = EXAMPLE / "base"
DIGEST = digest(BASE)
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
NAMESPACE = "team"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds:g} s")


class Process:
    """A role as `python -m …`, which can be killed and started again."""

    def __init__(self, *words: str, log: Path, env: Mapping[str, str] | None = None) -> None:
        self._words = words
        self._log = log
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._words],
            stdout=self._log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self._env,
        )

    @property
    def pid(self) -> int:
        assert self._process is not None, "started"
        return self._process.pid

    def wait(self, *, seconds: float = 300) -> int:
        """Exit code."""
        assert self._process is not None, "started"
        return self._process.wait(seconds)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def healthy(self, url: str) -> bool:
        assert self.running(), f"{self._words[0]} exited:\n{self.output()[-3000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return int(response.status) == 200
        except OSError:
            return False

    def output(self) -> str:
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """JSON log lines so far."""
        return [json.loads(line) for line in self.output().splitlines() if line.startswith("{")]


class ProgressServer:
    """Takes reports as an operator does, and remembers them with their tokens."""

    def __init__(self) -> None:
        self.reports: list[Progress] = []
        self.tokens: list[str] = []
        taken = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                taken.reports.append(Progress.model_validate_json(body))
                taken.tokens.append(self.headers.get("Authorization", ""))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def step(self) -> int:
        return self.reports[-1].step if self.reports else 0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclasses.dataclass(frozen=True)
class Pool:
    """A base kept resident, over one store."""

    store: str
    trainer: Process
    trainer_url: str
    gateway_url: str
    tenant_url: str
    faults: Path
    """What the gateway does wrong: see `faulty_gateway`."""

    def start_trainer(self) -> None:
        self.trainer.start()
        wait_until(lambda: self.trainer.healthy(f"{self.trainer_url}/healthz"), seconds=200, what="trainer")


def bundle(population: str, *, uid: str, members: int, steps: int, **run_spec: Any) -> RunBundle:
    """The example's run, smaller; `run_spec` replaces fields of its spec by their names on the wire."""
    population_spec = yaml.safe_load((EXAMPLE / "04-population.yaml").read_text())["spec"]
    population_spec["groups"][0]["members"]["count"] = members
    population_spec |= run_spec.pop("populationSpec", {})
    spec = yaml.safe_load((EXAMPLE / "05-run.yaml").read_text())["spec"]
    spec |= {"stop": {"steps": steps}, "evaluation": {"prompts": 8}} | run_spec
    return RunBundle.model_validate(
        {
            "namespace": NAMESPACE,
            "run": f"run-{population}",
            "runUid": uid,
            "population": population,
            "populationUid": f"uid-{population}",
            "runSpec": spec,
            "populationSpec": population_spec,
            "baseUri": f"file://{BASE}",
        }
    )


class DrivenRun:
    """One run and its drivers."""

    def __init__(self, pool: Pool, folder: Path, given: RunBundle, *, code: Path = EXAMPLE) -> None:
        self.pool = pool
        self.bundle = given
        self.progress = ProgressServer()
        self._folder = folder
        self._code = code
        self._drivers: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(given.model_dump_json(by_alias=True))
        self.token = folder / "token"
        self.token.write_text("a-token\n")

    def start(self) -> Process:
        """A driver; earlier ones stay as they are."""
        driver = Process(
            "allele_driver",
            *("--run-dir", str(self._folder), "--store", self.pool.store, "--trainer", self.pool.trainer_url),
            *("--gateways", self.pool.gateway_url, "--report", self.progress.url),
            *("--report-token-file", str(self.token)),
            log=self._folder / f"driver-{len(self._drivers)}.log",
            env={"PYTHONPATH": os.pathsep.join(filter(None, (str(self._code), os.environ.get("PYTHONPATH"))))},
        )
        driver.start()
        self._drivers.append(driver)
        return driver

    def wait_step(self, step: int) -> None:
        def reached() -> bool:
            assert self._drivers[-1].running(), self._drivers[-1].output()[-3000:]
            return self.progress.step >= step

        wait_until(reached, seconds=200, what=f"step {step}")

    def close(self) -> None:
        for driver in self._drivers:
            driver.kill()
        self.progress.close()

    @property
    def population(self) -> PopulationStore:
        return PopulationStore.open(self.pool.store, namespace=NAMESPACE, population=self.bundle.population)

    def facts(self) -> list[Fact]:
        return list(self.population.catalogue.facts())

    def exposed(self) -> dict[str, list[int]]:
        """Revisions by member, as they were exposed."""
        found: dict[str, list[int]] = {}
        for fact in (f for f in self.facts() if f.kind == "Exposed"):
            found.setdefault(fact.member, []).append(fact.revision or 0)
        return found

    def committed(self) -> dict[str, list[Fact]]:
        """By member, in order of revision."""
        found: dict[str, list[Fact]] = {}
        for fact in sorted((f for f in self.facts() if f.kind == "Committed"), key=lambda f: f.revision or 0):
            found.setdefault(fact.member, []).append(fact)
        return found

    def commits(self) -> list[int]:
        """Steps of the run's commits, in the order of the catalogue's log."""
        steps = []
        for entry in self._log():
            for action in entry:
                if action.get("txn", {}).get("appId") == f"run/{self.bundle.run_uid}":
                    steps.append(action["txn"]["version"])
        return steps

    def _log(self) -> list[list[dict[str, Any]]]:
        root = Path(self.pool.store.removeprefix("file://")) / NAMESPACE / self.bundle.population
        files = sorted((root / "catalogue/_delta_log").glob("*.json"))
        return [[json.loads(line) for line in f.read_text().splitlines()] for f in files]
