"""What the plans and the shell share: slim objects in, actions and a status out.

A plan is only as good as its world: the shell must put the answer of each write into the world before it plans the
same object again. Admission of runs relies on that (see `run.admission`): each announces itself by its finalizer, then
looks at the others, then creates its Job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from allele.api.schema import API_VERSION, GROUP
from allele.protocol.progress import Progress
from allele.protocol.serving import GatewayStatus

Obj = dict[str, Any]
"""An object as `observe.project` made it, or a manifest as `render` made it."""

GROUP_PREFIX = f"{GROUP}/"
POOL_LABEL = f"{GROUP}/pool"
RUN_LABEL = f"{GROUP}/run"
STORE_LABEL = f"{GROUP}/store"
POPULATION_LABEL = f"{GROUP}/population"
ROLE_LABEL = f"{GROUP}/role"
"""On every object that the operator makes, their pods and Jobs included: watch children by its existence."""
APPLIED_ANNOTATION = f"{GROUP}/applied"
"""Digest of what was applied last, so that an unchanged object is not applied again."""
FINALIZER = f"{GROUP}/members"
"""On a run that holds its members: no other run may train them until it is dropped."""
ERASE_FINALIZER = f"{GROUP}/erase"
"""On a population whose folder in the store is to be erased before the object goes."""


@dataclasses.dataclass(frozen=True)
class Resource:
    """Where the API server keeps a kind."""

    api_version: str
    plural: str


RESOURCES = {
    "AdapterStore": Resource(API_VERSION, "adapterstores"),
    "AdapterRuntime": Resource(API_VERSION, "adapterruntimes"),
    "BasePool": Resource(API_VERSION, "basepools"),
    "AdapterPopulation": Resource(API_VERSION, "adapterpopulations"),
    "RLRun": Resource(API_VERSION, "rlruns"),
    "JobSet": Resource("jobset.x-k8s.io/v1alpha2", "jobsets"),
    "CronJob": Resource("batch/v1", "cronjobs"),
    "Job": Resource("batch/v1", "jobs"),
    "Pod": Resource("v1", "pods"),
    "Service": Resource("v1", "services"),
    "ConfigMap": Resource("v1", "configmaps"),
}
PLANNED = ("AdapterStore", "AdapterRuntime", "BasePool", "AdapterPopulation", "RLRun")
"""Kinds that `plan` takes."""
CHILDREN = ("JobSet", "CronJob", "Job", "Pod", "Service", "ConfigMap")
"""Kinds that the operator makes; watched where they carry ROLE_LABEL. JobSet only with the JobSet backend."""


@dataclasses.dataclass(frozen=True, order=True)
class Ref:
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, obj: Obj) -> Ref:
        return cls(obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"])


@dataclasses.dataclass(frozen=True)
class Apply:
    """Server-side apply with force: for objects that are wholly ours (Service, ConfigMap, CronJob)."""

    body: Obj


@dataclasses.dataclass(frozen=True)
class Create:
    """Create once; AlreadyExists is success only when the object has our owner, else the plan waits for its end."""

    body: Obj


@dataclasses.dataclass(frozen=True)
class Delete:
    """Delete with the uid as precondition and foreground propagation, so that the object outlives its pods."""

    ref: Ref
    uid: str


@dataclasses.dataclass(frozen=True)
class Patch:
    """Change fields of an existing object: a dict is a merge patch, to which the shell adds metadata.uid.

    A list is a JSON patch (RFC 6902), needed inside lists; its first operation tests /metadata/uid.
    """

    ref: Ref
    uid: str
    body: Obj | list[Obj]


@dataclasses.dataclass(frozen=True)
class AddFinalizer:
    """Merge patch with resourceVersion; always alone in its plan, the object is planned again with the answer."""

    ref: Ref
    uid: str
    finalizer: str = FINALIZER


@dataclasses.dataclass(frozen=True)
class DropFinalizer:
    ref: Ref
    uid: str
    finalizer: str = FINALIZER


Action = Apply | Create | Delete | Patch | AddFinalizer | DropFinalizer


@dataclasses.dataclass(frozen=True)
class Event:
    """Sent after the status write that belongs to it succeeded."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    outlives: bool = False
    """About what stays when the namespace goes: told beside the operator where the namespace takes no more."""
    flickers: bool = False
    """Told once in a while for each reason, since its numbers are others each time."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Actions run in order, then one status write (skipped when equal to the object's), then the events."""

    actions: tuple[Action, ...] = ()
    status: Obj | None = None
    """The whole status; None: leave it."""
    events: tuple[Event, ...] = ()
    requeue: float | None = None
    """Seconds until the object must be planned again though nothing changed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the operator was started with and the plans need."""

    operator_url: str
    """Where drivers report, e.g. http://allele-operator.allele-system.svc:8080."""
    image: str
    """Image of the Jobs that probe a store, erase and collect: one that has `allele` and all that its store needs."""
    backend: Literal["JobSet", "Job"] = "JobSet"
    cluster_domain: str = "cluster.local"
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Of these Jobs."""


@dataclasses.dataclass(frozen=True)
class GatewaySeen:
    """What the gateway of one rollout pod reported last."""

    pod_uid: str
    at: datetime
    status: GatewayStatus


class World(Protocol):
    """What the operator knows of the cluster: projections of watched objects."""

    @property
    def options(self) -> Options: ...

    def get(self, ref: Ref) -> Obj | None: ...

    def owned(self, owner_uid: str, kind: str) -> list[Obj]:
        """Objects of the kind whose ownerReferences name the uid."""
        ...

    def select(self, kind: str, namespace: str) -> list[Obj]:
        """All known objects of the kind in the namespace."""
        ...

    def ends(self, namespace: str) -> bool:
        """Whether the namespace is being deleted; looked up before an object with ERASE_FINALIZER that is deleted is
        planned, and not known for any other."""
        ...

    def progress(self, uid: str) -> Progress | None:
        """Last report of the run's driver; None after a restart of the operator until the next one."""
        ...

    def gateways(self, uid: str) -> Sequence[GatewaySeen]:
        """Last reports of a pool's gateways, of pods that are gone too."""
        ...

    @property
    def listening(self) -> datetime:
        """Since when reports are taken: before, none can have come."""
        ...
