"""Rendered manifests, word for word: ALLELE_UPDATE_GOLDEN=1 writes them anew, and the diff is read in review."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from allele.api.pool import BasePoolSpec
from allele.api.population import Retention
from allele.api.run import RLRunSpec
from allele.api.runtime import AdapterRuntimeSpec
from allele.api.store import AdapterStoreSpec
from allele_operator.planning import admission, naming
from allele_operator.planning.collection import kept
from allele_operator.planning.model import Obj, Options, Ref
from allele_operator.planning.own_pool import own_pool
from allele_operator.planning.render import driver, store, upkeep
from allele_operator.planning.render import pool as render
from allele_operator.planning.render.access import StoreAccess
from allele_operator.planning.run import driver_parts
from tests.planning.cluster import OPTIONS, Cluster
from tests.planning.resources import demo, pool, population, run, runtime
from tests.planning.resources import store as a_store

GOLDEN = Path(__file__).parent / "golden"
PLATFORM = {
    "resources": {
        "trainer": {"requests": {"cpu": 2, "nvidia.com/gpu": "1"}, "limits": {"nvidia.com/gpu": "1"}},
        "engine": {"requests": {"cpu": "500m"}},
    },
    "podTemplate": {
        "labels": {"team": "research"},
        "annotations": {"kueue.x-k8s.io/podset-preferred-topology": "rack"},
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "high",
        "schedulerName": "other",
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
    },
    "environment": {"claimName": "allele-env"},
    "engine": {"args": ["--enable-metrics"], "maxTotalTokens": 32768, "contextLength": 2048},
    "sharedMemory": "2Gi",
}
QUEUE = {"kueue.x-k8s.io/queue-name": "research", "kueue.x-k8s.io/priority-class": "urgent", "team": "a"}


class _Plain(yaml.SafeDumper):
    """Manifests are read by people: no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)


def _pool(
    body: Obj, *, options: Options = OPTIONS, with_runtime: Obj | None = None, with_store: Obj | None = None
) -> list[Obj]:
    body["metadata"]["uid"] = "pool-uid"
    parts = render.PoolParts(
        name=body["metadata"]["name"],
        namespace="ns",
        spec=BasePoolSpec.model_validate(body["spec"]),
        runtime=AdapterRuntimeSpec.model_validate((with_runtime or runtime())["spec"]),
        store=StoreAccess.of(AdapterStoreSpec.model_validate((with_store or a_store())["spec"])),
        report_url=options.operator_url,
        trainer_url=naming.trainer_url(body["metadata"]["name"], "ns", options),
    )
    return [*render.services(body, parts), *render.workloads(body, parts, options)[1]]


def _driver(body: Obj, *, with_runtime: Obj | None = None, with_population: Obj | None = None) -> list[Obj]:
    cluster = demo(Cluster())
    cluster.converge()
    if with_runtime:
        cluster.edit("AdapterRuntime", "runtime", with_runtime)
    if with_population:
        cluster.edit("AdapterPopulation", "pop", with_population)
    cluster.add(body)
    seen = cluster.get(Ref.of(body))
    assert seen is not None
    seen["metadata"]["uid"] = "run-uid"
    found = admission.needs(seen, cluster)
    assert isinstance(found, admission.Needs), found
    parts = driver_parts(seen, RLRunSpec.model_validate(body["spec"]), found, OPTIONS)
    return [driver.bundle_config_map(seen, parts.bundle), driver.driver_job(seen, parts)]


def _probe(body: Obj) -> list[Obj]:
    body["metadata"]["uid"] = "store-uid"
    return [store.probe_job(body, AdapterStoreSpec.model_validate(body["spec"]), OPTIONS)]


def _upkeep(name: str, access: Obj | None = None) -> tuple[Obj, AdapterStoreSpec]:
    body = population()
    body["metadata"].update(name=name, uid="population-uid")
    return body, AdapterStoreSpec.model_validate((access or a_store())["spec"])


def _erase(store: Obj | None = None) -> list[Obj]:
    body, access = _upkeep("pop", store)
    return [upkeep.erase_job(body, access, OPTIONS)]


def _collect() -> list[Obj]:
    body, access = _upkeep("pop")
    policy = kept(Retention(keep_last=3), [run(uid="run-uid", pace={"maxPolicyLag": 4})], "pop").arguments()
    return [upkeep.collect_cron_job(body, access, OPTIONS, schedule="17 3 * * *", policy=policy)]


def _own_pool() -> list[Obj]:
    body = run("mine", labels=QUEUE, poolRef=None, runtimeRef="runtime", baseUri="s3://adapters/bases/tiny")
    body["metadata"]["uid"] = "run-uid"
    spec = RLRunSpec.model_validate(body["spec"])
    shape = admission.AdapterPopulationSpec.model_validate(population()["spec"])
    return [own_pool(body, spec, shape, suspend=False)]


LISTED = {
    "spec": {
        "groups": [
            {
                "name": "g",
                "members": {"manifest": {"configMap": "people", "key": "members.jsonl"}},
                "adapter": {"targets": ["q_proj"]},
            }
        ]
    }
}
AZURE = {"provider": "Azure", "account": "alleles", "region": None, "endpoint": "http://azurite:10000/alleles"}
IDENTITY = {"serviceAccountName": "trainer"}
CASES: dict[str, Callable[[], list[Obj]]] = {
    "pool": lambda: _pool(pool(rollout={"replicas": 2, "slots": 8})),
    "pool-serving": lambda: _pool(pool(trainer=None)),
    "pool-platform": lambda: _pool(pool(labels=QUEUE), with_runtime=runtime(**PLATFORM)),
    "pool-jobs": lambda: _pool(
        pool(), options=Options(operator_url=OPTIONS.operator_url, image=OPTIONS.image, backend="Job")
    ),
    "pool-claim": lambda: _pool(
        pool(base={"uri": "s3://adapters/bases/tiny", "digest": "sha256:" + "a" * 64, "volumeClaim": "bases"})
    ),
    "pool-folder": lambda: _pool(
        pool(base={"uri": "file:///models/tiny", "digest": "sha256:" + "a" * 64, "volumeClaim": "models"})
    ),
    "driver": lambda: _driver(run()),
    "driver-code": lambda: _driver(
        run(labels=QUEUE, code={"configMap": "task"}), with_runtime={"spec": PLATFORM}, with_population=LISTED
    ),
    "probe": lambda: _probe(a_store()),
    "probe-gcs": lambda: _probe(a_store(provider="GCS", region=None, endpoint=None)),
    "probe-azure": lambda: _probe(a_store(**AZURE)),
    "pool-azure-identity": lambda: _pool(pool(), with_store=a_store(**AZURE, credentials=IDENTITY)),
    "erase": _erase,
    "erase-azure-identity": lambda: _erase(a_store(**AZURE, credentials=IDENTITY)),
    "collect": _collect,
    "own-pool": _own_pool,
}


@pytest.mark.parametrize("name", CASES)
def test_manifests_are_as_written_down(name: str) -> None:
    text = yaml.dump_all(CASES[name](), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("ALLELE_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs: read the diff, then run with ALLELE_UPDATE_GOLDEN=1"


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_no_secret_is_read_and_every_container_is_confined(name: str) -> None:
    for pod in pod_specs(CASES[name]()):
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
            names = {v["name"] for v in pod["volumes"]}
            assert {m["name"] for m in container["volumeMounts"]} <= names


def pod_specs(manifests: list[Obj]) -> list[Obj]:
    """Pod specs of Jobs, CronJobs and JobSets."""
    found: list[Obj] = []
    for body in manifests:
        if body["kind"] == "Job":
            found.append(body["spec"]["template"]["spec"])
        if body["kind"] == "CronJob":
            found.append(body["spec"]["jobTemplate"]["spec"]["template"]["spec"])
        if body["kind"] == "JobSet":
            found += [r["template"]["spec"]["template"]["spec"] for r in body["spec"]["replicatedJobs"]]
    return found


def test_names_of_upkeep_fit_and_tell_long_names_apart() -> None:
    alike = [_upkeep("x" * 62 + end) for end in "ab"]
    alike[1][0]["metadata"]["uid"] = "another-uid"
    jobs = {upkeep.erase_job(body, access, OPTIONS)["metadata"]["name"] for body, access in alike}
    crons = {upkeep.collect_name(body) for body, _ in alike}
    assert len(jobs) == len(crons) == 2
    assert max(map(len, jobs)) <= 63 and max(map(len, crons)) <= 52


def test_the_template_hash_ignores_what_changes_in_place() -> None:
    names = {
        _pool(pool(rollout={"replicas": n, "slots": 16}, suspend=s))[-1]["metadata"]["name"]
        for n in (1, 5)
        for s in (True, False)
    }
    assert len(names) == 1
    assert names != {_pool(pool(trainer={"slots": 8}))[-1]["metadata"]["name"]}


def test_with_a_queue_the_number_of_rollouts_is_in_the_hash() -> None:
    names = {_pool(pool(labels=QUEUE, rollout={"replicas": n, "slots": 16}))[-1]["metadata"]["name"] for n in (1, 5)}
    assert len(names) == 2
