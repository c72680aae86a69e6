"""Pods, Services and the workload of a BasePool.

The workload is made once and never applied again, since Kueue writes into it. Its name carries the hash of what may
not change in place; `suspend` and the number of rollouts may, so they are not in the hash (with a queue they are:
Kueue counted the pods when it admitted them), nor is where gateways report. A JobSet's replicatedJobs are immutable
without an alpha gate, so rollouts are scaled on the child Job.
"""

from __future__ import annotations

import dataclasses

from allele.api.pool import BasePoolSpec
from allele.api.runtime import AdapterRuntimeSpec
from allele_operator.planning import naming
from allele_operator.planning.model import POOL_LABEL, RESOURCES, ROLE_LABEL, Obj, Options
from allele_operator.planning.render import pods
from allele_operator.planning.render.access import StoreAccess
from allele_operator.planning.render.pods import Volume

TEMPLATE_LABEL = "allele.dev/template"
_SETTLE_SECONDS, _FINISH_SECONDS = 5, 90
"""Of a rollout that is told to stop: until all nodes know that it leaves, then for requests under way."""
BACKOFF_LIMIT = 1_000_000
"""Roles restart in place for as long as the pool lives."""
MAX_RESTARTS = 10
"""Recreations of the whole JobSet before it is Failed; the operator then makes another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolParts:
    """What a pool's pods are made from; `name` is what tenants call the bare base."""

    name: str
    namespace: str
    spec: BasePoolSpec
    runtime: AdapterRuntimeSpec
    store: StoreAccess
    report_url: str
    """Where gateways report."""
    trainer_url: str
    """Where gateways get what was just trained, if the pool has a trainer."""


def base_volumes(spec: BasePoolSpec) -> tuple[Volume, ...]:
    """Folder of the base, and for a file:// base with a claim the claim at the path that the uri names."""
    claim = spec.base.volume_claim
    source = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}
    if not spec.base.uri.startswith("file://") or not claim:
        return (Volume("base", pods.BASE_DIR, source),)
    mounted = Volume("base-source", spec.base.uri.removeprefix("file://"), source, read_only=True)
    return (pods.empty("base", pods.BASE_DIR), mounted)


def _base_container(parts: PoolParts) -> Obj:
    runtime, base = parts.runtime, parts.spec.base
    command = ["python3", "-m", "allele_cli", "base", "fetch", "--uri", base.uri, "--digest", base.digest]
    return pods.container(
        "base",
        image=runtime.images.driver,
        pull_policy=runtime.images.pull_policy,
        command=[*command, "--to", pods.BASE_DIR],
        env=[*parts.store.env, *pods.runtime_env(runtime)],
        python_path=_python_path(runtime),
        volumes=(*base_volumes(parts.spec), *pods.environment(runtime)),
    )


def _python_path(runtime: AdapterRuntimeSpec) -> tuple[str, ...]:
    return (pods.ENVIRONMENT_DIR,) if runtime.environment else ()


def _mounted_base(spec: BasePoolSpec) -> Volume:
    """The base as the roles see it: fetched, checked, not to be written."""
    return dataclasses.replace(base_volumes(spec)[0], read_only=True)


def trainer_pod(parts: PoolParts) -> Obj:
    """Pod spec of the trainer. The pool must have one."""
    spec, runtime = parts.spec, parts.runtime
    if spec.trainer is None:
        raise ValueError(f"pool {parts.name}: expected a trainer, found a serving pool")
    command = ["python3", "-m", "allele_trainer", "--base", pods.BASE_DIR, "--base-digest", spec.base.digest]
    command += ["--store", parts.store.url, "--slots", str(spec.trainer.slots)]
    command += ["--max-rank", str(spec.adapters.max_rank), "--listen", f"0.0.0.0:{naming.TRAINER_PORT}"]
    command += ["--image", runtime.images.trainer]
    volumes = (pods.shared_memory(runtime), *pods.environment(runtime))
    trainer = pods.container(
        "trainer",
        image=runtime.images.trainer,
        pull_policy=runtime.images.pull_policy,
        command=command,
        env=[*parts.store.env, *pods.runtime_env(runtime)],
        python_path=_python_path(runtime),
        volumes=(_mounted_base(spec), *volumes),
        resources=runtime.resources.trainer,
        extra={
            "ports": [{"name": "trainer", "containerPort": naming.TRAINER_PORT, "protocol": "TCP"}],
            "readinessProbe": pods.http_probe(naming.TRAINER_PORT),
        },
    )
    return pods.pod_spec(
        containers=[trainer],
        init=[_base_container(parts)],
        volumes=(*base_volumes(spec), *volumes),
        service_account=parts.store.service_account,
    )


def rollout_pod(parts: PoolParts) -> Obj:
    """Pod spec of a rollout: the engine on localhost and the gateway, the only way in."""
    spec, runtime = parts.spec, parts.runtime
    cache, token = (pods.empty("cache", pods.CACHE_DIR), pods.shared_memory(runtime)), pods.token()
    return pods.pod_spec(
        containers=[_engine(parts, (_mounted_base(spec), *cache)), _gateway(parts, (*cache, token))],
        init=[_base_container(parts)],
        volumes=(*base_volumes(spec), *cache, token, *pods.environment(runtime)),
        service_account=parts.store.service_account,
        grace_seconds=_SETTLE_SECONDS + _FINISH_SECONDS + 20,
    )


def _engine(parts: PoolParts, volumes: tuple[Volume, ...]) -> Obj:
    spec, runtime = parts.spec, parts.runtime
    command = ["python3", "-m", "allele_rollout.engine", "--base", pods.BASE_DIR, "--port", str(naming.ENGINE_PORT)]
    command += ["--slots", str(spec.rollout.slots + 1), "--max-rank", str(spec.adapters.max_rank)]
    command += ["--targets", ",".join(spec.adapters.targets)]
    arguments = list(runtime.engine.args)
    if runtime.engine.max_total_tokens:
        arguments.append(f"--max-total-tokens {runtime.engine.max_total_tokens}")
    if runtime.engine.context_length:
        arguments.append(f"--context-length {runtime.engine.context_length}")
    return pods.container(
        "engine",
        image=runtime.images.engine,
        pull_policy=runtime.images.pull_policy,
        command=[*command, *(f"--engine-arg={a}" for a in arguments)],
        env=pods.runtime_env(runtime),
        python_path=_python_path(runtime),
        volumes=(*volumes, *pods.environment(runtime)),
        resources=runtime.resources.engine,
        # SIGTERM comes to both containers at once; the engine is needed until the gateway's last request is answered.
        extra={"lifecycle": {"preStop": {"httpGet": {"path": "/v1/drained", "port": naming.INTERNAL_PORT}}}},
    )


def _gateway(parts: PoolParts, volumes: tuple[Volume, ...]) -> Obj:
    spec, runtime = parts.spec, parts.runtime
    command = ["python3", "-m", "allele_rollout.gateway", "--engine", f"http://127.0.0.1:{naming.ENGINE_PORT}"]
    command += ["--store", parts.store.url, "--namespace", parts.namespace, "--base-name", parts.name]
    command += ["--base-digest", spec.base.digest, "--slots", str(spec.rollout.slots)]
    command += ["--listen", f"0.0.0.0:{naming.TENANT_PORT}", "--internal", f"0.0.0.0:{naming.INTERNAL_PORT}"]
    command += ["--cache-dir", pods.CACHE_DIR, *pods.report_arguments(parts.report_url)]
    command += ["--settle-seconds", str(_SETTLE_SECONDS), "--finish-seconds", str(_FINISH_SECONDS)]
    if spec.trainer is not None:
        command += ["--peer", parts.trainer_url]
    return pods.container(
        "gateway",
        image=runtime.images.gateway,
        pull_policy=runtime.images.pull_policy,
        command=command,
        env=[*parts.store.env, *pods.runtime_env(runtime)],
        python_path=_python_path(runtime),
        volumes=(*volumes, *pods.environment(runtime)),
        resources=runtime.resources.gateway,
        extra={
            "ports": [
                {"name": "tenant", "containerPort": naming.TENANT_PORT, "protocol": "TCP"},
                {"name": "internal", "containerPort": naming.INTERNAL_PORT, "protocol": "TCP"},
            ],
            "readinessProbe": pods.http_probe(naming.INTERNAL_PORT),
        },
    )


def services(pool: Obj, parts: PoolParts) -> list[Obj]:
    """Tenant, rollout and trainer Services, each with the digest of itself."""
    tenant: Obj = {
        "selector": naming.pool_labels(parts.name, "rollout"),
        "ports": [{"name": "http", "port": 80, "targetPort": naming.TENANT_PORT, "protocol": "TCP"}],
    }
    rollout: Obj = {
        "clusterIP": "None",
        "selector": naming.pool_labels(parts.name, "rollout"),
        "ports": [{"name": "internal", "port": naming.INTERNAL_PORT, "protocol": "TCP"}],
    }
    trainer: Obj = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": naming.pool_labels(parts.name, "trainer"),
        "ports": [{"name": "trainer", "port": naming.TRAINER_PORT, "protocol": "TCP"}],
    }
    specs = [(parts.name, tenant), (naming.rollout_service(parts.name), rollout)]
    if parts.spec.trainer is not None:
        specs.append((naming.trainer_service(parts.name), trainer))
    return [
        naming.applied(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {
                    "name": name,
                    "namespace": parts.namespace,
                    "labels": {POOL_LABEL: parts.name, ROLE_LABEL: "service"},
                    "ownerReferences": [naming.owner_reference(pool)],
                },
                "spec": spec,
            }
        )
        for name, spec in specs
    ]


def workloads(pool: Obj, parts: PoolParts, options: Options) -> tuple[str, list[Obj]]:
    """(template hash, objects to create once): one JobSet, or one Indexed Job a role where JobSet is absent."""
    jobs = _jobs(parts)
    queue = naming.queue_labels(pool)
    queued = naming.queued(pool)
    # an operator that is reached elsewhere now is no reason to take serving pods down
    anywhere = _jobs(dataclasses.replace(parts, report_url=""))
    fixed = {r: _without_counts(j) if r == "rollout" and not queued else j for r, j in anywhere.items()}
    hashed = naming.digest({"jobs": fixed, "queue": queue, "backend": options.backend})
    metadata: Obj = {
        "namespace": parts.namespace,
        "labels": queue | {POOL_LABEL: parts.name, ROLE_LABEL: "pool", TEMPLATE_LABEL: hashed},
        "ownerReferences": [naming.owner_reference(pool)],
    }
    suspend = parts.spec.suspend or queued
    if options.backend == "JobSet":
        return hashed, [_job_set(metadata | {"name": f"{parts.name}-{hashed}"}, jobs, suspend=suspend)]
    return hashed, [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata
            | {
                "name": f"{parts.name}-{role}-{hashed}",
                "labels": metadata["labels"] | naming.pool_labels(parts.name, role),
            },
            "spec": job | {"suspend": suspend},
        }
        for role, job in jobs.items()
    ]


def job_scale(replicas: int) -> Obj:
    """Fields of an Indexed Job with that many pods; none at all must not make it complete."""
    return {"parallelism": replicas, "completions": max(replicas, 1)}


def _without_counts(job: Obj) -> Obj:
    return {k: v for k, v in job.items() if k not in ("parallelism", "completions")}


def _jobs(parts: PoolParts) -> dict[str, Obj]:
    """By role."""
    roles = {"rollout": (rollout_pod(parts), parts.spec.rollout.replicas)}
    if parts.spec.trainer is not None:
        roles = {"trainer": (trainer_pod(parts), 1)} | roles
    return {role: _job(parts, role, spec, replicas) for role, (spec, replicas) in roles.items()}


def _job(parts: PoolParts, role: str, pod: Obj, replicas: int) -> Obj:
    labels = naming.pool_labels(parts.name, role) | dict(parts.store.labels)
    return job_scale(replicas) | {
        "completionMode": "Indexed",
        "backoffLimit": BACKOFF_LIMIT,
        "template": pods.pod_template(pod, parts.runtime, labels),
    }


def _job_set(metadata: Obj, jobs: dict[str, Obj], *, suspend: bool) -> Obj:
    return {
        "apiVersion": RESOURCES["JobSet"].api_version,
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "suspend": suspend,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": MAX_RESTARTS},
            "replicatedJobs": [
                {
                    "name": role,
                    "replicas": 1,
                    "template": {
                        "metadata": {"labels": {POOL_LABEL: metadata["labels"][POOL_LABEL], ROLE_LABEL: role}},
                        "spec": job,
                    },
                }
                for role, job in jobs.items()
            ],
        },
    }
