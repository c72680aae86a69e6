"""A cluster in memory: objects, what an API server does with our writes, and what controllers make of them.

Objects are kept raw and given to plans through `observe.project`, as the operator's cache does. Nothing happens by
itself: `reconcile` plans one object and executes it, `controllers` lets JobSet, Job, kubelet and the garbage collector
take one step, `converge` alternates both until nothing moves.
"""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from allele.protocol.progress import Progress
from allele_operator.planning.model import (
    PLANNED,
    RESOURCES,
    Action,
    AddFinalizer,
    Apply,
    Create,
    Delete,
    DropFinalizer,
    GatewaySeen,
    Obj,
    Options,
    Patch,
    Plan,
    Ref,
)
from allele_operator.planning.observe import project
from allele_operator.planning.plan import dependents, plan

OPTIONS = Options(operator_url="http://allele-operator.allele-system.svc:8080", image="operator:1")
START = datetime(2026, 1, 1, tzinfo=UTC)
ERASED = {"erased": True, "reason": "Erased", "message": "s3://adapters/demo/ns/pop: deleted 9 objects (9 kB)"}
COLLECTED = {"collected": True, "reason": "Collected", "message": "retired 12 revisions"}
REACHABLE = {"reachable": True, "reason": "Reachable", "message": "all works", "create_only": True, "list": True}


class Cluster:
    """`probe`, `erase` and `collect` are what these pods report; `ready` tells whether pods of pools get ready, and
    `ending` whether the namespace is being deleted."""

    def __init__(self, options: Options = OPTIONS) -> None:
        self.options = options
        self.now = START
        self.probe: Obj = dict(REACHABLE)
        self.erase: Obj = dict(ERASED)
        self.collect: Obj = dict(COLLECTED)
        self.ending = False
        self.ready = True
        self.reports: dict[str, Progress] = {}
        self.listening = START
        self.seen: dict[str, list[GatewaySeen]] = {}
        self.log: list[str] = []
        self._objects: dict[Ref, Obj] = {}
        self._serial = 0

    # What plans see.

    def get(self, ref: Ref) -> Obj | None:
        raw = self._objects.get(ref)
        return project(ref.kind, raw) if raw else None

    def owned(self, owner_uid: str, kind: str) -> list[Obj]:
        return [
            project(kind, o)
            for r, o in sorted(self._objects.items())
            if r.kind == kind and any(w["uid"] == owner_uid for w in o["metadata"].get("ownerReferences", ()))
        ]

    def select(self, kind: str, namespace: str) -> list[Obj]:
        return [
            project(kind, o) for r, o in sorted(self._objects.items()) if r.kind == kind and r.namespace == namespace
        ]

    def ends(self, namespace: str) -> bool:
        return self.ending

    def progress(self, uid: str) -> Progress | None:
        return self.reports.get(uid)

    def gateways(self, uid: str) -> list[GatewaySeen]:
        return self.seen.get(uid, [])

    # What users and controllers do.

    def raw(self, kind: str, name: str) -> Obj:
        return self._objects[Ref(kind, "ns", name)]

    def refs(self, kind: str) -> list[Ref]:
        return sorted(r for r in self._objects if r.kind == kind)

    def add(self, body: Obj) -> Obj:
        """A new object, as POST makes it."""
        body = copy.deepcopy(body)
        self._serial += 1
        head = body["metadata"]
        head.setdefault("namespace", "ns")
        head.setdefault("uid", f"uid-{self._serial}")
        head.setdefault("creationTimestamp", self._stamp())
        head.update(generation=head.get("generation", 1), resourceVersion=str(self._serial))
        ref = Ref(body["kind"], head["namespace"], head["name"])
        assert ref not in self._objects, f"{ref} exists"
        self._objects[ref] = body
        return body

    def edit(self, kind: str, name: str, change: Obj) -> None:
        """A merge patch by a user; a change of the spec raises the generation."""
        raw = self.raw(kind, name)
        before = copy.deepcopy(raw.get("spec"))
        _merge(raw, change)
        if raw.get("spec") != before:
            raw["metadata"]["generation"] += 1
        self._touch(raw)

    def delete(self, kind: str, name: str) -> None:
        raw = self.raw(kind, name)
        raw["metadata"].setdefault("deletionTimestamp", self._stamp())
        self._touch(raw)
        self._collect()

    def remove(self, kind: str, name: str) -> None:
        del self._objects[Ref(kind, "ns", name)]

    def finish(self, run: str, *, succeed: bool = True) -> None:
        """The driver of a run ends."""
        for job in self._children("RLRun", run, "Job"):
            end = {"type": "Complete" if succeed else "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
            job.setdefault("status", {})["conditions"] = [end | {"message": "", "lastTransitionTime": self._stamp()}]
            for pod in self._children("Job", job["metadata"]["name"], "Pod"):
                del self._objects[Ref.of(pod)]

    def tick(self) -> None:
        """The time of every CronJob's schedule has come."""
        for ref in self.refs("CronJob"):
            raw = self._objects[ref]
            self._serial += 1
            template = copy.deepcopy(raw["spec"]["jobTemplate"])
            name = f"{ref.name}-{self._serial}"
            self._child(raw, "Job", name, template["metadata"]["labels"], spec=template["spec"])

    # What the operator does.

    def decide(self, ref: Ref) -> Plan:
        obj = self.get(ref)
        return plan(ref.kind, obj, self, self.now) if obj else Plan()

    def reconcile(self, ref: Ref, *, writes: int | None = None) -> bool:
        """Plan and execute; with `writes` the operator is killed after that many. True when anything was written."""
        decided = self.decide(ref)
        for action in decided.actions[:writes]:
            self.execute(action)
        if writes is not None and writes <= len(decided.actions):
            return bool(writes)
        wrote = self.write_status(ref, decided)
        return wrote or bool(decided.actions)

    def write_status(self, ref: Ref, decided: Plan) -> bool:
        raw = self._objects.get(ref)
        if raw is None or decided.status is None or raw.get("status", {}) == decided.status:
            return False
        assert len(json.dumps(decided.status)) <= 32 * 1024
        raw["status"] = copy.deepcopy(decided.status)
        self._touch(raw)
        self.log += [f"{e.type} {e.reason}" for e in decided.events]
        return True

    def execute(self, action: Action) -> None:
        match action:
            case Apply(body):
                ref = Ref.of(body)
                if ref in self._objects:
                    self.edit(ref.kind, ref.name, {k: body[k] for k in body if k != "metadata"})
                    self._objects[ref]["metadata"]["annotations"] = dict(body["metadata"]["annotations"])
                else:
                    self.add(body)
            case Create(body):
                if Ref.of(body) not in self._objects:
                    self.add(body)
            case Delete(ref, uid):
                if self._is(ref, uid):
                    self.delete(ref.kind, ref.name)
            case Patch(ref, uid, body):
                assert isinstance(body, dict)
                if self._is(ref, uid):
                    self.edit(ref.kind, ref.name, body)
            case AddFinalizer(ref, uid, finalizer):
                if self._is(ref, uid):
                    self._objects[ref]["metadata"].setdefault("finalizers", []).append(finalizer)
                    self._touch(self._objects[ref])
            case DropFinalizer(ref, uid, finalizer):
                if self._is(ref, uid):
                    self._objects[ref]["metadata"]["finalizers"].remove(finalizer)
                    self._touch(self._objects[ref])
                    self._collect()

    def controllers(self) -> bool:
        """One step of everybody else. True when it changed anything."""
        before = json.dumps(list(self._objects.values()))
        for ref in self.refs("JobSet"):
            self._job_set(self._objects[ref])
        for ref in self.refs("Job"):
            self._job(self._objects[ref])
        self._collect()
        return before != json.dumps(list(self._objects.values()))

    def converge(self, rounds: int = 40) -> None:
        """Everybody works until nothing moves; fails when that takes more rounds."""
        for _ in range(rounds):
            moved = [self.reconcile(ref) for kind in PLANNED for ref in self.refs(kind)]
            if not any([*moved, self.controllers()]):
                return
            self.now += timedelta(seconds=1)
        raise AssertionError(f"no rest after {rounds} rounds: {self.log[-10:]}")

    def converge_by_events(self, seen: dict[Ref, Obj] | None = None, steps: int = 400) -> None:
        """As the shell does it: only what changed, and what `dependents` names for it, is planned.

        `seen` is the world before the changes that start it; default: nothing was known.
        """
        seen = seen or {}
        for _ in range(steps):
            now = self.snapshot()
            changed = [r for r in seen.keys() | now.keys() if seen.get(r) != now.get(r)]
            queue = {r for r in changed if r.kind in PLANNED and r in now}
            for ref in changed:
                for obj in (seen.get(ref), now.get(ref)):
                    queue |= dependents(ref.kind, obj, self) if obj else set()
            seen = now
            for ref in sorted(queue):
                self.reconcile(ref)
            if not self.controllers() and self.snapshot() == seen:
                return
            self.now += timedelta(seconds=1)
        raise AssertionError(f"no rest after {steps} steps: {self.log[-10:]}")

    def snapshot(self) -> dict[Ref, Obj]:
        return {ref: project(ref.kind, raw) for ref, raw in copy.deepcopy(self._objects).items()}

    def at_rest(self) -> bool:
        """Whether every plan of the world as it is does nothing."""
        decided = {ref: self.decide(ref) for kind in PLANNED for ref in self.refs(kind)}
        return all(
            not p.actions and (p.status is None or p.status == self._objects[ref].get("status", {}))
            for ref, p in decided.items()
        )

    # Below.

    def _is(self, ref: Ref, uid: str) -> bool:
        return ref in self._objects and self._objects[ref]["metadata"]["uid"] == uid

    def _stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def _touch(self, raw: Obj) -> None:
        self._serial += 1
        raw["metadata"]["resourceVersion"] = str(self._serial)

    def _children(self, kind: str, name: str, child: str) -> list[Obj]:
        uid = self.raw(kind, name)["metadata"]["uid"]
        return [
            o
            for r, o in list(self._objects.items())
            if r.kind == child and any(w["uid"] == uid for w in o["metadata"].get("ownerReferences", ()))
        ]

    def _child(self, parent: Obj, kind: str, name: str, labels: Obj, **rest: Any) -> None:
        ref = Ref(kind, "ns", name)
        if ref not in self._objects and "deletionTimestamp" not in parent["metadata"]:
            owner = {k: parent["metadata"][k] for k in ("name", "uid")} | {"kind": parent["kind"]}
            head = {"name": name, "labels": dict(labels), "ownerReferences": [owner]}
            self.add({"apiVersion": RESOURCES[kind].api_version, "kind": kind, "metadata": head} | rest)

    def _job_set(self, raw: Obj) -> None:
        for job in raw["spec"]["replicatedJobs"]:
            name = f"{raw['metadata']['name']}-{job['name']}-0"
            spec = copy.deepcopy(job["template"]["spec"]) | {"suspend": raw["spec"]["suspend"]}
            self._child(raw, "Job", name, job["template"]["metadata"]["labels"], spec=spec)
            if Ref("Job", "ns", name) in self._objects:
                self.raw("Job", name)["spec"]["suspend"] = raw["spec"]["suspend"]

    def _job(self, raw: Obj) -> None:
        name, spec = raw["metadata"]["name"], raw["spec"]
        over = any(c["status"] == "True" for c in raw.get("status", {}).get("conditions", ()))
        wanted = 0 if spec.get("suspend") or over else spec.get("parallelism", 1)
        labels = spec["template"]["metadata"]["labels"]
        for i in range(wanted):
            self._child(raw, "Pod", f"{name}-{i}", labels, spec={}, status={"phase": "Pending"})
        for pod in self._children("Job", name, "Pod"):
            if over:
                continue  # a probe's pod keeps its message
            if int(pod["metadata"]["name"].rsplit("-", 1)[1]) >= wanted:
                del self._objects[Ref.of(pod)]
            else:
                pod["status"] = self._pod_status(labels["allele.dev/role"])
        report = self._report(labels["allele.dev/role"])
        if report and not over and wanted:
            end = {"type": "Complete" if _good(report) else "Failed", "status": "True"}
            raw["status"] = {"conditions": [end | {"lastTransitionTime": self._stamp()}]}

    def _report(self, role: str) -> Obj | None:
        """What a pod of the role says when it ends, at once; None for roles that stay."""
        return {"probe": self.probe, "erase": self.erase, "collect": self.collect}.get(role)

    def _pod_status(self, role: str) -> Obj:
        if report := self._report(role):
            end = {"exitCode": 0 if _good(report) else 1, "message": json.dumps(report)}
            phase = "Succeeded" if _good(report) else "Failed"
            return {"phase": phase, "containerStatuses": [{"name": role, "state": {"terminated": end}}]}
        if not (self.ready or role == "driver"):
            return {"phase": "Pending"}
        condition = {"type": "Ready", "status": "True"}
        container = {"name": role, "ready": True, "restartCount": 0, "state": {"running": {}}}
        return {"phase": "Running", "conditions": [condition], "containerStatuses": [container]}

    def _collect(self) -> None:
        """Finalizers, deletion (of Jobs and JobSets in the foreground), and the garbage collector."""
        for _ in range(5):
            uids = {o["metadata"]["uid"] for o in self._objects.values()}
            for ref, raw in list(self._objects.items()):
                head = raw["metadata"]
                owners = head.get("ownerReferences", ())
                if owners and not any(o["uid"] in uids for o in owners):
                    head.setdefault("deletionTimestamp", self._stamp())
                if "deletionTimestamp" not in head or head.get("finalizers"):
                    continue
                if ref.kind in PLANNED:  # a user's deletion is in the background: children go later
                    del self._objects[ref]
                    continue
                children = self._children(ref.kind, ref.name, "Job") + self._children(ref.kind, ref.name, "Pod")
                for child in children:
                    child["metadata"].setdefault("deletionTimestamp", self._stamp())
                if not children:
                    del self._objects[ref]


def _good(report: Obj) -> bool:
    return bool(report.get("reachable") or report.get("erased") or report.get("collected"))


def _merge(into: Obj, change: Obj) -> None:
    """RFC 7386."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
