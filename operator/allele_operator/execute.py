"""Carries out the actions of a plan, one API call each, and reports every answer to the world.

Every action is safe to repeat: the operator may be killed after any of them, and a second process then plans from what
it sees. None of them overwrites what somebody else changed meanwhile.
"""

from __future__ import annotations

from typing import Protocol

from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.kube import Kube
from allele_operator.planning.model import (
    ROLE_LABEL,
    Action,
    AddFinalizer,
    Apply,
    Create,
    Delete,
    DropFinalizer,
    Obj,
    Patch,
    Ref,
    World,
)


class NameTaken(Exception):
    """A child cannot be made: its name belongs to an object of somebody else, or of a deleted namesake."""


class WorldChanged(Exception):
    """A live look showed something that the plan did not know: decide again."""


class Sink(Protocol):
    """Where answers go: the cache, which also queues whoever depends on the change."""

    def seen(self, raw: Obj) -> bool:
        """True when it told something new."""
        ...

    def gone(self, ref: Ref, *, uid: str) -> None: ...


class Executor:
    def __init__(self, kube: Kube, world: World, sink: Sink) -> None:
        self._kube = kube
        self._world = world
        self._sink = sink

    async def run(self, action: Action) -> None:
        match action:
            case Apply(body):
                self._sink.seen(await self._kube.apply(body))
            case Create(body):
                await self._create(body)
            case Delete(ref, uid):
                await self._delete(ref, uid)
            case Patch(ref, uid, patch):
                await self._patch(ref, uid, patch)
            case AddFinalizer(ref, uid, finalizer):
                await self._finalizers(ref, uid, add=finalizer)
            case DropFinalizer(ref, uid, finalizer):
                await self._look_again(ref)
                await self._finalizers(ref, uid, drop=finalizer)

    async def _create(self, body: Obj) -> None:
        answer = await self._kube.create(body)
        if answer is not None:
            self._sink.seen(answer)
            return
        head = body["metadata"]
        found = await self._kube.get(body["kind"], namespace=head["namespace"], name=head["name"])
        if found is None:
            raise WorldChanged(f"{body['kind']} {head['name']} went away while it was to be made")
        owners = {o["uid"] for o in head.get("ownerReferences", ())}
        if not owners & {o["uid"] for o in found["metadata"].get("ownerReferences", ())}:
            raise NameTaken(
                f"{body['kind']} {head['namespace']}/{head['name']} exists and does not belong to {sorted(owners)}: "
                "it is made when the other one is gone"
            )
        self._sink.seen(found)

    async def _delete(self, ref: Ref, uid: str) -> None:
        await self._kube.delete(ref.kind, namespace=ref.namespace, name=ref.name, uid=uid)
        left = await self._kube.get(ref.kind, namespace=ref.namespace, name=ref.name)
        if left is None or left["metadata"]["uid"] != uid:
            self._sink.gone(ref, uid=uid)
        else:  # foreground: it stays, marked, until its own children are gone
            self._sink.seen(left)

    async def _patch(self, ref: Ref, uid: str, patch: Obj | list[Obj]) -> None:
        body = patch if isinstance(patch, list) else patch | {"metadata": {**patch.get("metadata", {}), "uid": uid}}
        await self._change(ref, uid, body)

    async def _finalizers(self, ref: Ref, uid: str, *, add: str = "", drop: str = "") -> None:
        """The list of finalizers is replaced as a whole, hence the resourceVersion that it was read at."""
        obj = self._world.get(ref)
        if obj is None or obj["metadata"]["uid"] != uid:
            return
        head = obj["metadata"]
        names = [f for f in head["finalizers"] if f not in (add, drop)] + ([add] if add else [])
        if names != head["finalizers"]:
            version = head["resourceVersion"]
            await self._change(ref, uid, {"metadata": {"uid": uid, "resourceVersion": version, "finalizers": names}})

    async def _change(self, ref: Ref, uid: str, body: Obj | list[Obj]) -> None:
        try:
            answer = await self._kube.patch(ref.kind, namespace=ref.namespace, name=ref.name, body=body)
        except ApiError as e:
            if not e.not_found:
                raise
            self._sink.gone(ref, uid=uid)
            return
        if "deletionTimestamp" in answer["metadata"] and not answer["metadata"].get("finalizers"):
            self._sink.gone(ref, uid=uid)  # that was the last finalizer
        else:
            self._sink.seen(answer)

    async def _look_again(self, ref: Ref) -> None:
        """Before giving up a finalizer: the cache may lag, and a Job that it does not know yet would go on alone."""
        changed = False
        async for page in self._kube.pages("Job", namespace=ref.namespace, selector=ROLE_LABEL):
            for raw in page.items:
                owners = raw["metadata"].get("ownerReferences", ())
                if any(o["kind"] == ref.kind and o["name"] == ref.name for o in owners):
                    changed = self._sink.seen(raw) or changed
        if changed:
            raise WorldChanged(f"{ref.kind} {ref.namespace}/{ref.name} has a Job that was not known")
