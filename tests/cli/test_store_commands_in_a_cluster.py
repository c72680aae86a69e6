"""What the commands on a store take from a cluster; kubectl is a script that answers as one would."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from allele.store import Fact, Objects, PopulationRecord, PopulationStore
from allele_cli.access import stores_of
from allele_cli.failure import Failure
from allele_cli.main import app

RUNNER = CliRunner(env={"COLUMNS": "250"})
POPULATION: dict[str, Any] = {
    "metadata": {"name": "users", "uid": "uid-1"},
    "spec": {"storeRef": "main", "retention": {"keepLast": 2, "graceHours": 1}},
}
STORE: dict[str, Any] = {
    "metadata": {"name": "main"},
    "spec": {"bucket": "the-bucket"},
    "status": {
        "url": "s3://the-bucket",
        "capabilities": ["CreateOnly", "List"],
        "latency": {"put": 12, "get": 8, "conditionalPut": 14},
        "conditions": [{"type": "Reachable", "status": "True", "reason": "Reachable", "message": "all well"}],
    },
}


def run_of(name: str, phase: str, lag: int, population: str = "users") -> dict[str, Any]:
    spec = {
        "populationRef": population,
        "poolRef": "p",
        "pace": {"maxPolicyLag": lag},
        "stop": {"steps": 1},
        "groups": [{"select": {"group": "g"}, "environment": {"path": "e:E"}, "optimizer": {"learningRate": 0.1}}],
    }
    conditions = [{"type": t, "status": str(phase == t)} for t in ("Succeeded", "Failed")]
    status = {"phase": phase, "conditions": conditions}
    return {"metadata": {"name": name, "uid": f"uid-of-{name}"}, "spec": spec, "status": status}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PopulationStore:
    """A folder in place of the bucket, and a kubectl that knows one store, one population and three runs of it."""
    answers = {
        "adapterpopulation users": POPULATION,
        "adapterpopulation --namespace": {"items": [POPULATION]},
        "adapterstore main": STORE,
        "adapterstore --namespace": {"items": [STORE]},
        "rlrun --namespace": {
            "items": [run_of("open", "Running", 3), run_of("ended", "Failed", 60), run_of("x", "Running", 50, "others")]
        },
    }
    for words, answer in answers.items():
        (tmp_path / words).write_text(json.dumps(answer))
    kubectl = tmp_path / "bin/kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(f'#!/bin/sh\ncat "{tmp_path}/$2 $3" 2>/dev/null || {{ echo "$3 not found" >&2; exit 1; }}\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")
    real = Objects.open
    there = f"file://{tmp_path}/store"
    monkeypatch.setattr(Objects, "open", lambda url, *rest: real(url.replace("s3://the-bucket", there), *rest))
    return PopulationStore.open(there, namespace="team", population="users")


def answer(*words: str) -> list[dict[str, Any]]:
    done = RUNNER.invoke(app, [*words, "--namespace", "team", "-o", "json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_gc_keeps_what_the_population_and_its_open_runs_declare(store: PopulationStore) -> None:
    from allele_cli.gc import _declared

    policy = _declared("users", "team")
    assert (policy.keep_last, policy.every, policy.grace.total_seconds()) == (2, 0, 3600)
    assert (policy.max_policy_lag, policy.runs) == (3, {"uid-of-open"})
    place = store.write_segments({"m": b"x"})["m"]
    fact = Fact.committed(member="m", revision=1, weights=place, shape="s")
    store.catalogue.start("r").commit(1, [fact])
    assert answer("gc", "users", "--dry-run") == []


def test_a_folder_whose_population_is_gone_or_another_is_an_orphan(store: PopulationStore) -> None:
    store.claim(PopulationRecord(uid="uid-1", base_digest="b", shapes={}))
    assert answer("gc", "--orphans") == []
    root = store.objects.url().removesuffix("/users")
    for name, uid in (("old", "uid-0"), ("nobody", None)):
        other = PopulationStore.open(root.removesuffix("/team"), namespace="team", population=name)
        other.objects.put("segments/x.seg", b"12")
        if uid:
            other.claim(PopulationRecord(uid=uid, base_digest="b", shapes={}))
    assert [(r["folder"], r["reason"]) for r in answer("gc", "--orphans")] == [
        (f"{root}/nobody", "no population.json"),
        (f"{root}/old", "no AdapterPopulation has the uid uid-0"),
    ]


def test_a_folder_that_is_being_erased_is_told(store: PopulationStore) -> None:
    store.claim(PopulationRecord(uid="uid-1", base_digest="b", shapes={}, erasing=True))
    store.objects.put("catalogue/_delta_log/00000000000000000001.json", b"{}")
    (found,) = answer("populations")
    assert (found["state"], found["members"]) == ("being erased", None)
    assert answer("gc", "--orphans") == [], "its population waits for that"
    other = PopulationStore.of(Objects.open("s3://the-bucket"), namespace="team", population="old")
    other.claim(PopulationRecord(uid="uid-0", base_digest="b", shapes={}, erasing=True))
    (orphan,) = answer("gc", "--orphans")
    assert orphan["reason"] == "no AdapterPopulation has the uid uid-0, whose erasure was begun"


def test_stores_are_those_of_the_namespace(store: PopulationStore) -> None:
    (found,) = answer("stores")
    assert found == {
        "name": "main",
        "url": "s3://the-bucket",
        "reachable": "True",
        "reason": "Reachable",
        "capabilities": "CreateOnly List",
        "latency": "12/8/14 ms",
        "message": "all well",
    }
    store.claim(PopulationRecord(uid="uid-1", base_digest="b", shapes={}))
    assert [r["population"] for r in answer("populations")] == ["users"]


def test_what_the_cluster_does_not_know_is_named_in_one_line(store: PopulationStore) -> None:
    with pytest.raises(Failure, match="adapterpopulation team/nobody: nobody not found; give --store"):
        RUNNER.invoke(app, ["gc", "nobody", "--namespace", "team"], catch_exceptions=False)


def write_answers(folder: Path, spec: dict[str, Any], secret: dict[str, str]) -> None:
    """What kubectl says of a namespace with one store and one secret."""
    data = {name: base64.b64encode(value.encode()).decode() for name, value in secret.items()}
    (folder / "adapterstore --namespace").write_text(json.dumps({"items": [STORE | {"spec": spec}]}))
    (folder / "secret keys").write_text(json.dumps({"data": data}))


@pytest.mark.parametrize(
    ("spec", "secret", "url", "environ"),
    [
        (
            {"bucket": "bbb", "endpoint": "http://s3:7070"},
            {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"},
            "s3://bbb",
            {"AWS_ACCESS_KEY_ID": "id", "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": "http://s3:7070"},
        ),
        (
            {"provider": "GCS", "bucket": "bbb", "prefix": "p/q"},
            {"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"},
            "gs://bbb/p/q",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"},
        ),
        (
            {"provider": "Azure", "account": "alleles", "bucket": "bbb"},
            {"AZURE_STORAGE_ACCOUNT_KEY": "a2V5", "SOMETHING_ELSE": "x"},
            "az://bbb",
            {"AZURE_STORAGE_ACCOUNT_NAME": "alleles", "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"},
        ),
    ],
)
def test_a_store_is_opened_with_what_its_pods_have(
    store: PopulationStore,
    tmp_path: Path,
    spec: dict[str, Any],
    secret: dict[str, str],
    url: str,
    environ: dict[str, str],
) -> None:
    named = spec | {"credentials": {"secretName": "keys"}}
    write_answers(tmp_path, named, secret)
    ((found, variables),) = stores_of("team", None)
    assert found == url
    assert {name: variables[name] for name in environ} == environ
    assert "SOMETHING_ELSE" not in variables
    write_answers(tmp_path, named, {"OTHER": "x"})
    with pytest.raises(Failure, match=r"secret team/keys: expected the key .*, found OTHER"):
        stores_of("team", None)
