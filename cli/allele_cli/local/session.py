"""One pool and one run as processes of this machine, from the operator's own manifests.

files ─► models ─► operator's render ─► pods ─► addresses replaced ─► processes, restarted like kubelet does
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from allele.api.pool import Adapters, Base, BasePoolSpec, Rollout, Trainer
from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.runtime import AdapterRuntimeSpec, Images
from allele.protocol.bundle import RunBundle
from allele_cli.base import put_base
from allele_cli.display import Display
from allele_cli.failure import Failure
from allele_cli.local.pods import Addresses, LocalPod, interpreter, localise, write_files
from allele_cli.local.processes import Process, run_once
from allele_cli.local.reports import Reports
from allele_operator.planning import naming
from allele_operator.planning.model import Options
from allele_operator.planning.render.access import StoreAccess
from allele_operator.planning.render.driver import DriverParts, driver_pod, run_json
from allele_operator.planning.render.pool import PoolParts, rollout_pod, trainer_pod

POOL_RESTARTS = 20
OPTIONS = Options(operator_url="http://allele-operator.allele-system.svc:8080", image="local")
_PROVIDERS = ("AWS_", "GOOGLE_", "GCE_METADATA_", "STORAGE_EMULATOR_HOST", "AZURE_")
"""Where the names of variables begin that say how to reach a store."""

LOCAL_IMAGES = Images(trainer="local", engine="local", gateway="local", driver="local")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `allele run` was asked for."""

    namespace: str
    population: str
    population_spec: AdapterPopulationSpec
    run: str
    run_spec: RLRunSpec
    runtime: AdapterRuntimeSpec
    store: str
    base: Path
    code: Path | None
    manifests: Path
    """Folder with <configMap>/<key> of the population's manifests."""
    slots: int
    out: Path

    @property
    def pool(self) -> str:
        return self.run_spec.pool_ref or naming.own_pool(self.run)

    @property
    def base_uri(self) -> str:
        return f"{self.store}/bases/{self.pool}"

    def uid(self, kind: str, name: str) -> str:
        """The same for the same store and name, so that running again resumes."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.store}/{self.namespace}/{kind}/{name}"))


@dataclasses.dataclass(frozen=True)
class Ports:
    trainer: int
    engine: int
    tenant: int
    internal: int
    report: int

    @classmethod
    def free(cls) -> Ports:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in dataclasses.fields(cls)]
            for s in sockets:
                s.bind(("127.0.0.1", 0))
            return cls(*(s.getsockname()[1] for s in sockets))


def pool_parts(plan: Plan) -> PoolParts:
    """A pool just large enough for the run."""
    adapters = [g.adapter for g in plan.population_spec.groups]
    spec = BasePoolSpec(
        base=Base(uri=plan.base_uri, digest=plan.population_spec.base.digest),
        runtime_ref="local",
        store_ref="local",
        adapters=Adapters(
            max_rank=max(a.stored_rank for a in adapters),
            targets=list(dict.fromkeys(t for a in adapters for t in a.targets)),
        ),
        trainer=Trainer(slots=plan.slots),
        rollout=Rollout(replicas=1, slots=plan.slots),
    )
    return PoolParts(
        name=plan.pool,
        namespace=plan.namespace,
        spec=spec,
        runtime=plan.runtime,
        store=store_access(plan.store),
        report_url=OPTIONS.operator_url,
        trainer_url=naming.trainer_url(plan.pool, plan.namespace, OPTIONS),
    )


def driver_parts(plan: Plan) -> DriverParts:
    bundle = RunBundle(
        namespace=plan.namespace,
        run=plan.run,
        run_uid=plan.uid("RLRun", plan.run),
        population=plan.population,
        population_uid=plan.uid("AdapterPopulation", plan.population),
        run_spec=plan.run_spec,
        population_spec=plan.population_spec,
        base_uri=plan.base_uri,
        image="local",
    )
    return DriverParts(
        bundle=bundle,
        runtime=plan.runtime,
        store=store_access(plan.store),
        trainer_url=naming.trainer_url(plan.pool, plan.namespace, OPTIONS),
        gateway_urls=(naming.gateway_url(plan.pool, plan.namespace, OPTIONS),),
        report_url=OPTIONS.operator_url,
    )


def store_access(url: str) -> StoreAccess:
    """A bucket is reached by what our own environment says of its provider, under the same names."""
    names = [] if url.startswith("file:") else [n for n in os.environ if n.startswith(_PROVIDERS)]
    return StoreAccess(
        url, tuple({"name": n, "valueFrom": {"secretKeyRef": {"name": "local", "key": n}}} for n in sorted(names))
    )


def addresses(plan: Plan, ports: Ports) -> Addresses:
    """Everything in the manifests that depends on where a role runs."""
    local = "http://127.0.0.1:{}".format
    return Addresses(
        paths={},
        hosts={
            naming.trainer_url(plan.pool, plan.namespace, OPTIONS): local(ports.trainer),
            naming.gateway_url(plan.pool, plan.namespace, OPTIONS): local(ports.internal),
            OPTIONS.operator_url: local(ports.report),
            f"http://127.0.0.1:{naming.ENGINE_PORT}": local(ports.engine),
            f"0.0.0.0:{naming.TRAINER_PORT}": f"127.0.0.1:{ports.trainer}",
            f"0.0.0.0:{naming.TENANT_PORT}": f"127.0.0.1:{ports.tenant}",
            f"0.0.0.0:{naming.INTERNAL_PORT}": f"127.0.0.1:{ports.internal}",
        },
        words={str(naming.ENGINE_PORT): str(ports.engine)} | interpreter(),
    )


def local_pods(plan: Plan, ports: Ports, *, token: str) -> dict[str, LocalPod]:
    """Trainer, rollout and driver as processes; writes the driver's files below `plan.out`."""
    where = addresses(plan, ports)
    pool, driver = pool_parts(plan), driver_parts(plan)
    tokens = {"token": write_files(plan.out / "token", [("token", token)])}
    given = tokens | {
        "run": write_files(plan.out / "driver/run", [("run.json", run_json(driver.bundle))]),
        "code": plan.code or plan.out / "driver/code",
    }
    if plan.manifests.is_dir():
        link = given["run"] / "manifests"
        link.unlink(missing_ok=True)
        link.symlink_to(plan.manifests.resolve())
    pods = {"trainer": trainer_pod(pool), "rollout": rollout_pod(pool), "driver": driver_pod(driver)}
    restarts = {"driver": plan.run_spec.failure_policy.backoff_limit}
    return {
        name: localise(
            pod,
            name=name,
            root=plan.out / name,
            addresses=where,
            given=given if name == "driver" else tokens,
            restarts=restarts.get(name, POOL_RESTARTS),
        )
        for name, pod in pods.items()
    }


class Session:
    """The running processes. `endpoint` answers OpenAI clients while the context is open."""

    def __init__(self, plan: Plan, ports: Ports, pods: dict[str, LocalPod], reports: Reports, display: Display) -> None:
        self.endpoint = f"http://127.0.0.1:{ports.tenant}"
        self.reports = reports
        self._display = display
        self._logs = plan.out / "logs"
        self.processes = {
            s.name: Process(s, logs=self._logs, on_restart=self._restarted)
            for pod in pods.values()
            for s in pod.containers
        }
        self._pods = pods
        self._tasks: set[asyncio.Task[int]] = set()

    def _restarted(self, name: str, code: int) -> None:
        self._display.say(f"{name} ended with exit code {code}, starting it again; log: {self._logs / name}.log")

    async def prepare(self) -> None:
        await asyncio.gather(*(run_once(s, logs=self._logs) for pod in self._pods.values() for s in pod.inits))

    async def train(self) -> None:
        """Until the driver is done. Raises Failure when any process failed too often."""
        pool = {asyncio.create_task(p.run()) for name, p in self.processes.items() if name != "driver"}
        driver = asyncio.create_task(self.processes["driver"].run())
        self._tasks = pool | {driver}
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task is not driver:
                task.result()
                raise Failure("a process of the pool ended though nobody stopped it; see the logs")
        driver.result()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def session(plan: Plan, display: Display) -> AsyncIterator[Session]:
    """Put the base into the store, start everything, stop everything at the end."""
    (plan.out / "logs").mkdir(parents=True, exist_ok=True)
    digest = await asyncio.to_thread(put_base, plan.base, uri=plan.base_uri)
    if digest != plan.population_spec.base.digest:
        raise Failure(
            f"base {plan.base}: expected {plan.population_spec.base.digest} as in the population, found {digest}"
        )
    ports = Ports.free()
    reports = Reports(display.show, say=display.say)
    await reports.start(ports.report)
    running = Session(plan, ports, local_pods(plan, ports, token=reports.token), reports, display)
    try:
        await running.prepare()
        yield running
    finally:
        await running.stop()
        await reports.stop()


def default_runtime() -> AdapterRuntimeSpec:
    """Without --runtime: one thread a role, as two roles share this machine's cores."""
    return AdapterRuntimeSpec.model_validate(
        {"images": LOCAL_IMAGES.model_dump(), "podTemplate": {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}}
    )
