"""The driver of a run: a ConfigMap with its bundle and one Job.

The bundle follows the population and the run (members added, an earlier stop): kubelet brings changes into the pod.
The Job is made once; a driver that fails restarts in place and resumes from the last commit.
"""

from __future__ import annotations

import dataclasses

from allele.api.runtime import AdapterRuntimeSpec
from allele.protocol.bundle import RunBundle
from allele_operator.planning import naming
from allele_operator.planning.model import POPULATION_LABEL, ROLE_LABEL, RUN_LABEL, Obj
from allele_operator.planning.render import pods
from allele_operator.planning.render.access import StoreAccess
from allele_operator.planning.render.pods import Volume

RUN_DIR = "/allele/run"
CODE_DIR = "/allele/code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriverParts:
    """What a driver is made from; `bundle_map` is the ConfigMap that holds its run.json."""

    bundle: RunBundle
    runtime: AdapterRuntimeSpec
    store: StoreAccess
    trainer_url: str
    gateway_urls: tuple[str, ...]
    report_url: str

    @property
    def bundle_map(self) -> str:
        return naming.bundle_name(self.bundle.run)


def run_json(bundle: RunBundle) -> str:
    """Byte for byte what the driver reads, on a cluster and in local mode."""
    return bundle.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"


def bundle_config_map(run: Obj, bundle: RunBundle) -> Obj:
    return naming.applied(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": naming.bundle_name(bundle.run),
                "namespace": bundle.namespace,
                "labels": {RUN_LABEL: bundle.run, ROLE_LABEL: "bundle"},
                "ownerReferences": [naming.owner_reference(run)],
            },
            "data": {"run.json": run_json(bundle)},
        }
    )


def _run_volume(parts: DriverParts) -> Volume:
    """One projected volume, because a folder cannot be mounted below a read-only one."""
    manifests = sorted(
        {(m.config_map, m.key) for g in parts.bundle.population_spec.groups if (m := g.members.manifest)}
    )
    sources: list[Obj] = [{"configMap": {"name": parts.bundle_map, "items": [{"key": "run.json", "path": "run.json"}]}}]
    sources += [
        {"configMap": {"name": name, "items": [{"key": key, "path": f"manifests/{name}/{key}"}]}}
        for name, key in manifests
    ]
    return Volume("run", RUN_DIR, {"projected": {"sources": sources}}, read_only=True)


def driver_pod(parts: DriverParts) -> Obj:
    runtime, code = parts.runtime, parts.bundle.run_spec.code
    volumes = [_run_volume(parts), pods.token(), *pods.environment(runtime)]
    python_path = [pods.ENVIRONMENT_DIR] if runtime.environment else []
    if code is not None:
        volumes.append(Volume("code", CODE_DIR, {"configMap": {"name": code.config_map}}, read_only=True))
        python_path.insert(0, CODE_DIR)
    command = ["python3", "-m", "allele_driver", "--run-dir", RUN_DIR, "--store", parts.store.url]
    command += ["--trainer", parts.trainer_url, "--gateways", ",".join(parts.gateway_urls)]
    command += pods.report_arguments(parts.report_url)
    driver = pods.container(
        "driver",
        image=runtime.images.driver,
        pull_policy=runtime.images.pull_policy,
        command=command,
        env=[*parts.store.env, *pods.runtime_env(runtime)],
        python_path=python_path,
        volumes=volumes,
        resources=runtime.resources.driver,
    )
    return pods.pod_spec(
        containers=[driver], volumes=volumes, service_account=parts.store.service_account, grace_seconds=120
    )


def driver_job(run: Obj, parts: DriverParts) -> Obj:
    bundle = parts.bundle
    labels = {RUN_LABEL: bundle.run, ROLE_LABEL: "driver"}
    template = pods.pod_template(driver_pod(parts), parts.runtime, labels | dict(parts.store.labels))
    queue = naming.queue_labels(run)
    fixed: Obj = {
        "backoffLimit": bundle.run_spec.failure_policy.backoff_limit,
        "template": template,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{bundle.run}-{naming.digest({'job': fixed, 'queue': queue})}",
            "namespace": bundle.namespace,
            "labels": queue | labels | {POPULATION_LABEL: bundle.population},
            "ownerReferences": [naming.owner_reference(run)],
        },
        "spec": fixed | {"suspend": bundle.run_spec.suspend or naming.queued(run)},
    }


def volume_names(parts: DriverParts) -> str:
    """What the driver's pod waits for when it is not created: kubelet tells only in its events."""
    manifests = {m.config_map for g in parts.bundle.population_spec.groups if (m := g.members.manifest)}
    code = parts.bundle.run_spec.code
    names = [f"ConfigMap {n}" for n in sorted(manifests | ({code.config_map} if code else set()))]
    if parts.runtime.environment:
        names.append(f"claim {parts.runtime.environment.claim_name}")
    return ", ".join(names)
