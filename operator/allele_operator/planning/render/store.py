"""The Job that probes a store from inside the namespace, with the credentials that its pods will have."""

from __future__ import annotations

from allele.api.store import AdapterStoreSpec
from allele_operator.planning import naming
from allele_operator.planning.model import ROLE_LABEL, STORE_LABEL, Obj, Options
from allele_operator.planning.render import pods
from allele_operator.planning.render.access import StoreAccess

DEADLINE_SECONDS = 600
"""A probe that has no answer by then has failed; a missing secret or image shows long before."""


def probe_job(store: Obj, spec: AdapterStoreSpec, options: Options) -> Obj:
    access = StoreAccess.of(spec)
    command = ["python3", "-m", "allele.store.capability", "--store", access.url]
    probe = pods.container(
        "probe",
        image=options.image,
        pull_policy=options.pull_policy,
        command=[*command, "--termination-log", "/dev/termination-log"],
        env=access.env,
    )
    labels = {STORE_LABEL: store["metadata"]["name"], ROLE_LABEL: "probe"}
    body: Obj = {
        "backoffLimit": 0,
        "activeDeadlineSeconds": DEADLINE_SECONDS,
        "template": {
            "metadata": {"labels": labels | dict(access.labels)},
            "spec": pods.pod_spec(
                containers=[probe],
                volumes=(),
                service_account=access.service_account,
                restart_policy="Never",
                grace_seconds=5,
            ),
        },
    }
    name = store["metadata"]["name"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{name}-probe-{naming.digest(body)}",
            "namespace": store["metadata"]["namespace"],
            "labels": labels,
            "ownerReferences": [naming.owner_reference(store)],
        },
        "spec": body,
    }
