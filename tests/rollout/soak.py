"""An hour of changing revisions with random faults: `make soak-rollout`, `ARGS="--seed N"` for the same faults again.

The engine and the gateway are killed, the store goes away, files on disk are damaged. Every answer is compared with
the reference of its member and revision, and the memory of both processes must not grow.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from allele.residency.space import pages
from tests.rollout.churn import Churn
from tests.rollout.rollout_engine import SLOTS, EngineProcess, free_port
from tests.rollout.rollout_parts import BASE_DIGEST, SHAPE, Service, StoredPopulation
from tests.store.proxy import Proxy, Rule
from tests.store.servers import BUCKET, serve

MEMBERS, HOST, DISK = 256, 48, 128
WARM = 300.0
"""Seconds after its start from which a process's memory counts."""
GROWTH = 0.05
"""Share by which it may then grow."""


class GatewayProcess:
    """The gateway as a process of its own."""

    def __init__(self, engine: EngineProcess, *, store: str, folder: Path, environ: dict[str, str]) -> None:
        ports = free_port(), free_port()
        self.service = Service(tenant=f"http://127.0.0.1:{ports[0]}", internal=f"http://127.0.0.1:{ports[1]}")
        size = SHAPE.packed_bytes
        settings = {
            "engine": engine.url,
            "store": store,
            "namespace": "team",
            "base-name": "tiny",
            "base-digest": BASE_DIGEST,
            "cache-dir": str(folder / "cache"),
            "slots": SLOTS,
            "host-bytes": HOST * pages(size),
            "cache-bytes": DISK * size,
            "listen": f"127.0.0.1:{ports[0]}",
            "internal": f"127.0.0.1:{ports[1]}",
            "tail-seconds": 0.2,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self._command = [sys.executable, "-m", "allele_rollout.gateway", *words]
        self._environ = {**os.environ, **environ}
        self._log = folder / "gateway.log"
        self.start()

    def start(self) -> None:
        log = self._log.open("ab")
        self.process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environ)
        self.service.wait_healthy(seconds=300)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Memory:
    """Memory that a process and its children have to themselves, against what it was when the process was warm."""

    def __init__(self) -> None:
        self._warm: dict[int, int] = {}
        """By pid."""

    def look(self, pid: int) -> tuple[int, float]:
        """Bytes now, and the share by which they grew since it was warm."""
        process = psutil.Process(pid)
        now = sum(p.memory_full_info().uss for p in (process, *process.children(recursive=True)))
        if time.time() - process.create_time() > WARM:
            self._warm.setdefault(pid, now)
        return now, now / self._warm.get(pid, now) - 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rollout.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run (default: 60)")
    parser.add_argument("--fault-every", type=float, default=8.0, help="minutes between faults, 0: none (default: 8)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with (
        tempfile.TemporaryDirectory() as name,
        serve(Path(name)) as server,
        Proxy.start(server.environ) as proxy,
    ):
        engine = EngineProcess(Path(name) / "engine.log")
        engine.start()
        engine.wait()
        try:
            return soak(arguments, Path(name), engine, proxy)
        finally:
            engine.kill()


def soak(arguments: argparse.Namespace, folder: Path, engine: EngineProcess, proxy: Proxy) -> int:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    gateway = GatewayProcess(engine, store=url, folder=folder, environ=proxy.environ)
    population = StoredPopulation(url, namespace="team", name="styles", environ=proxy.environ)
    churn = Churn(gateway.service, population, members=MEMBERS, seed=arguments.seed)
    churn.start(clients=8, publish_every=1.0, publish=16)
    memory, problems = Memory(), list[str]()
    some = Faults(engine, gateway, proxy, folder / "cache", churn, random.Random(arguments.seed))
    begun, faults = time.monotonic(), 0
    while (minutes := (time.monotonic() - begun) / 60) < arguments.minutes:
        time.sleep(30)
        if arguments.fault_every and minutes >= (faults + 1) * arguments.fault_every:
            faults += 1
            fault = some.any()
            print(f"{minutes:5.1f} min: {fault.__name__}", flush=True)
            fault()
        before = churn.answers
        problems += look(memory, engine, gateway)
        problems += churn.check()
        churn.wrong.clear()
        print(f"{minutes:5.1f} min: {before} answers, {dict(churn.outcomes)}, {len(problems)} problems", flush=True)
    churn.stop()
    problems += churn.check()
    gateway.kill()
    for problem in problems[:20]:
        print(problem)
    print(f"{churn.answers} answers, {faults} faults, {len(problems)} problems")
    return 1 if problems or not churn.answers else 0


def look(memory: Memory, engine: EngineProcess, gateway: GatewayProcess) -> list[str]:
    found = []
    for what, pid in (("engine", engine.pid), ("gateway", gateway.process.pid)):
        size, growth = memory.look(pid)
        print(f"           {what}: {size >> 20} MiB, {growth:+.1%} since warm", flush=True)
        if growth > GROWTH:
            found.append(f"{what}: memory grew by {growth:.1%} to {size >> 20} MiB")
    return found


@dataclasses.dataclass
class Faults:
    """What is done to a run."""

    engine: EngineProcess
    gateway: GatewayProcess
    proxy: Proxy
    cache: Path
    churn: Churn
    dice: random.Random

    def any(self) -> Callable[[], None]:
        return self.dice.choice([self.kill_engine, self.kill_gateway, self.lose_store, self.damage_disk])

    def kill_engine(self) -> None:
        self.engine.kill()
        self.engine.start()
        self.engine.wait()
        self.gateway.service.wait_healthy(seconds=300)

    def kill_gateway(self) -> None:
        self.gateway.kill()
        self.gateway.start()

    def lose_store(self) -> None:
        with self.churn.without_store(), self.proxy.rule(Rule(action="answer", times=0, status=503)):
            time.sleep(60)

    def damage_disk(self) -> None:
        for path in self.cache.iterdir():
            if path.is_file() and self.dice.random() < 0.5:
                with path.open("r+b") as f:
                    f.truncate(self.dice.randrange(1000))


if __name__ == "__main__":
    sys.exit(main())
