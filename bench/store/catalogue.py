"""Commits, the index, a long history, and an object per adapter in etcd in place of a catalogue."""

from __future__ import annotations

import datetime
import json
import pathlib
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from allele.store import Catalogue, Fact, Index, delta
from allele.store.facts import SCHEMA
from bench.report import Report
from bench.store.places import Place

T = TypeVar("T")

_TIME = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def commits(report: Report, place: Place, *, count: int, members: int) -> None:
    writer = Catalogue.open(place.store()).start("run")
    taken = []
    for step in range(1, count + 1):
        facts = [
            Fact(
                kind="Committed",
                member=f"m{i}",
                revision=step,
                digest="d" * 64,
                segment="s",
                offset=i,
                length=1,
                shape="s",
                metrics={"reward": 0.5},
            )
            for i in range(members)
        ]
        began = time.perf_counter()
        writer.commit(step, facts)
        taken.append(time.perf_counter() - began)
    row: dict[str, object] = {"what": f"commit of {members}", "place": place.name, "by": "allele"}
    report.rows.append(row | _quantiles(taken))


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"p50 ms": float(p50), "p99 ms": float(p99)}


def committed(members: int, *, revision: int = 1, kind: str = "Committed", first: int = 0) -> pa.Table:
    """A fact of each member, as a driver commits it."""
    rng = np.random.default_rng(revision)
    columns: dict[str, Any] = {
        "kind": [kind] * members,
        "member": [f"user-{first + i:08d}" for i in range(members)],
        "group": ["user"] * members,
        "revision": [revision] * members,
        "step": [revision] * members,
        "digest": [rng.bytes(32).hex() for _ in range(members)],
        "segment": [f"segments/{i // 1000:026d}.seg" for i in range(members)],
        "offset": np.arange(members) % 1000 * 100_000,
        "length": [100_000] * members,
        "run": ["0" * 36] * members,
        "fence": [1] * members,
        "probe": [[-0.5] * 8] * members,
        "metrics": [[("reward", 0.5)]] * members,
        "provenance": ["f" * 64] * members,
        "shape": ["e" * 64] * members,
        "time": [_TIME + datetime.timedelta(seconds=revision)] * members,
    }
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(members, f.type) for f in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def index(report: Report, place: Place, *, members: int, asked: int = 20_000) -> None:
    """Committed and exposed facts of all members; then what a gateway asks for each request."""
    catalogue = Catalogue.open(place.store())
    table = catalogue.snapshot(create=True)
    assert table is not None
    for number, kind in enumerate(("Committed", "Exposed")):
        delta.commit(table, [("run/x", number)], delta.stage(catalogue.objects, committed(members, kind=kind)))
        table.update_incremental()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    found = Index.load(catalogue)
    loaded = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    taken = []
    for i in np.random.default_rng(0).integers(0, members, asked).tolist():
        name = f"user-{i:08d}"
        began = time.perf_counter()
        fact = found.exposed(name)
        taken.append(time.perf_counter() - began)
        assert fact is not None and fact.weights is not None
    found_in = _quantiles(taken)
    report.rows.append(
        {
            "what": f"index of {members}",
            "place": place.name,
            "by": "allele",
            "s": loaded,
            "MB": grown,
            **found_in,
        }
    )
    report.ratios[f"resolve at {members} on {place.name} within 1 ms (p99)"] = 1.0 / found_in["p99 ms"]


def long_history(report: Report, place: Place, *, commits: int, members: int = 16) -> None:
    """A catalogue as so many commits leave it: a log entry for each, its facts in files as compaction made them.

    One commit in ten made revisions, of which all but the newest ten are retired, as by a collector that runs daily.
    """
    catalogue = Catalogue.open(place.store())
    table = catalogue.snapshot(create=True)
    assert table is not None
    folder = pathlib.Path(catalogue.objects.url().removeprefix("file://")) / "_delta_log"
    per_file = 1000
    for at in range(0, commits, per_file):
        made = [at + i + 1 for i in range(0, per_file, 10)]
        retired = [r for r in made if r <= commits - 100]
        facts = [committed(members, revision=r) for r in made]
        facts += [committed(members, revision=r, kind="Retired") for r in retired]
        rows = pa.concat_tables(facts)
        file = delta.stage(catalogue.objects, rows)
        first = at + 1
        for version in range(first, first + per_file):
            actions: list[dict[str, Any]] = [{"txn": {"appId": "run/x", "version": version}}]
            if version == first:
                add = {"path": file.path, "size": file.size, "partitionValues": {}, "stats": "{}"}
                actions.append({"add": add | {"modificationTime": file.modified, "dataChange": True}})
            (folder / f"{version:020d}.json").write_text("\n".join(json.dumps(a) for a in actions))
    table.update_incremental()
    table.create_checkpoint()
    fresh = Catalogue(catalogue.objects)
    fact = Fact(kind="Committed", member="m", revision=1, digest="d", segment="s", offset=0, length=1, shape="s")
    what = f"{commits} commits of history: "
    found = _timed(report, what + "load of an index", place, lambda: Index.load(Catalogue(catalogue.objects)))
    catalogue.write_heads()
    gateway = _timed(
        report,
        what + "load of what counts now",
        place,
        lambda: Index.load(Catalogue(catalogue.objects), history=False),
    )
    newest = gateway.newest("user-00000000")
    assert newest is not None and newest == found.newest("user-00000000")
    writer = _timed(report, what + "start of a writer", place, lambda: fresh.start("another"))
    _timed(report, what + "commit that compacts", place, lambda: writer.commit(1, []))
    _timed(report, what + "commit", place, lambda: writer.commit(2, [fact]))
    news = _timed(report, what + "news of it", place, found.refresh)
    assert [f.member for f in news] == ["m"]


def _timed(report: Report, what: str, place: Place, work: Callable[[], T]) -> T:
    began = time.perf_counter()
    found = work()
    report.rows.append({"what": what, "place": place.name, "by": "allele", "s": time.perf_counter() - began})
    return found


CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: benchadapters.bench.allele.dev}
spec:
  group: bench.allele.dev
  names: {kind: BenchAdapter, plural: benchadapters}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""


def custom_resources(report: Report, kubectl: Sequence[str], *, members: int) -> None:
    """One custom resource for each adapter, made by kubectl from one file: how long, and a list of them afterwards."""

    def run(*words: str, text: str = "") -> str:
        return subprocess.run([*kubectl, *words], input=text, check=True, capture_output=True, text=True).stdout

    run("apply", "--filename", "-", text=CRD)
    try:
        run("wait", "--for=condition=Established", "crd/benchadapters.bench.allele.dev", "--timeout=30s")
        table = committed(members).drop_columns(["time"]).to_pylist()
        items = [
            {
                "apiVersion": "bench.allele.dev/v1",
                "kind": "BenchAdapter",
                "metadata": {"name": row["member"], "namespace": "default"},
                "spec": {k: v for k, v in row.items() if v is not None and k != "metrics"},
            }
            for row in table
        ]
        before = _memory("kube-apiserver")
        began = time.perf_counter()
        run("create", "--filename", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        made = time.perf_counter() - began
        began = time.perf_counter()
        run("get", "benchadapters", "--namespace", "default", "--output", "name")
        listed = time.perf_counter() - began
        report.rows.append(
            {
                "what": f"make {members} adapters known",
                "place": "etcd",
                "by": "custom resources",
                "s": made,
                "MB": _memory("kube-apiserver") - before,
            }
        )
        report.rows.append({"what": f"list {members} adapters", "place": "etcd", "by": "custom resources", "s": listed})
    finally:
        run("delete", "crd", "benchadapters.bench.allele.dev", "--wait=true")


def _memory(process: str) -> float:
    """Resident MB of a process of this machine, by name."""
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if lines["Name"].strip() == process[:15]:
            return int(lines["VmRSS"].split()[0]) / 1e3
    return float("nan")
