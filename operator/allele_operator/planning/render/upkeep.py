"""Jobs that work on the folder of a population, with the credentials that its pods have: erasure, and collection by a
CronJob. What they run is `allele.store.jobs`."""

from __future__ import annotations

from collections.abc import Sequence

from allele.api.store import AdapterStoreSpec
from allele_operator.planning import naming
from allele_operator.planning.model import POPULATION_LABEL, ROLE_LABEL, Obj, Options
from allele_operator.planning.render import pods
from allele_operator.planning.render.access import StoreAccess

ERASE, COLLECT = "erase", "collect"
"""Roles, and the commands of `allele.store.jobs`."""

_ERASE_SECONDS = 3600
"""An attempt ends after this and the next one goes on from there; a missing secret or image shows long before."""
_COLLECT_SECONDS = 6 * 3600
"""A pass that hangs must not keep all later ones from starting. What it has done counts."""
_COLLECT_ATTEMPTS = 3
_LATE_SECONDS = 3600
"""A pass that could not be started in time (no controller, the last one still at it) is left out after this."""


def folder(population: Obj, store: AdapterStoreSpec) -> str:
    """URL of all that the population has in the store."""
    head = population["metadata"]
    return f"{StoreAccess.of(store).url}/{head['namespace']}/{head['name']}"


def erase_job(population: Obj, store: AdapterStoreSpec, options: Options) -> Obj:
    """At most one pod at a time, and one attempt: the plan waits between attempts, and tells why."""
    spec = {"backoffLimit": 0, "podReplacementPolicy": "Failed", "activeDeadlineSeconds": _ERASE_SECONDS}
    body = spec | {"template": _template(population, store, ERASE, (), options)}
    name = f"{_short(population, 47)}-erase-{naming.digest(body)}"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(population, ERASE, name), "spec": body}


def collect_name(population: Obj) -> str:
    """At most 52 characters, so that the names of its Jobs fit in 63; with the uid, which a namesake has not."""
    return f"{_short(population, 34)}-collect-{naming.digest(population['metadata']['uid'])}"


def collect_cron_job(
    population: Obj, store: AdapterStoreSpec, options: Options, *, schedule: str, policy: Sequence[str]
) -> Obj:
    """`policy` are the arguments that say what to keep. The last pass of each outcome stays, for its report."""
    job = {
        "backoffLimit": _COLLECT_ATTEMPTS - 1,
        "activeDeadlineSeconds": _COLLECT_SECONDS,
        "template": _template(population, store, COLLECT, policy, options),
    }
    body = {
        "schedule": schedule,
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": _LATE_SECONDS,
        "successfulJobsHistoryLimit": 1,
        "failedJobsHistoryLimit": 1,
        "jobTemplate": {"metadata": {"labels": _labels(population, COLLECT)}, "spec": job},
    }
    head = _metadata(population, COLLECT, collect_name(population))
    return naming.applied({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": head, "spec": body})


def _template(population: Obj, store: AdapterStoreSpec, role: str, more: Sequence[str], options: Options) -> Obj:
    access, head = StoreAccess.of(store), population["metadata"]
    place = ["--store", access.url, "--namespace", head["namespace"], "--population", head["name"]]
    command = ["python3", "-m", "allele.store.jobs", role, *place, "--uid", head["uid"], *more]
    container = pods.container(
        role,
        image=options.image,
        pull_policy=options.pull_policy,
        command=[*command, "--termination-log", "/dev/termination-log"],
        env=access.env,
    )
    spec = pods.pod_spec(
        containers=[container],
        volumes=(),
        service_account=access.service_account,
        restart_policy="Never",  # a pod for each attempt, so that its last words stay
        grace_seconds=5,
    )
    return {"metadata": {"labels": _labels(population, role) | dict(access.labels)}, "spec": spec}


def _metadata(population: Obj, role: str, name: str) -> Obj:
    return {
        "name": name,
        "namespace": population["metadata"]["namespace"],
        "labels": _labels(population, role),
        "ownerReferences": [naming.owner_reference(population)],
    }


def _labels(population: Obj, role: str) -> dict[str, str]:
    return {POPULATION_LABEL: population["metadata"]["name"], ROLE_LABEL: role}


def _short(population: Obj, limit: int) -> str:
    name: str = population["metadata"]["name"]
    return name[:limit].rstrip("-")
