"""The few verbs an operator needs, each in the one form that is safe for it.

- Children that others change after us (JobSet, Job) are created once: an existing one is the one of before.
- Children that are only ours (Service, ConfigMap, CronJob) are applied server-side, forced.
- Objects of users are changed by merge patch with uid and resourceVersion: server-side apply would bring back one that
  was deleted meanwhile.
- Status is a merge patch with resourceVersion (uid is no precondition there) by this one writer.
- A delete names the uid, so that it never hits a successor of the same name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.kinds import Obj, api_version, group_version, path, resource
from allele_operator.cluster.transport import APPLY_PATCH, JSON_PATCH, MERGE_PATCH, Request, Transport

FIELD_MANAGER = "allele-operator"
_STRICT = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}


@dataclass(frozen=True)
class Page:
    items: list[Obj]
    version: str
    """resourceVersion that the listing was taken at, the same on all its pages."""


class Kube:
    """The API server's verbs. Every method may raise ApiError; every write may raise FenceShut."""

    def __init__(self, transport: Transport, *, chunk: int = 500) -> None:
        self._transport = transport
        self._chunk = chunk

    async def pages(self, kind: str, *, namespace: str | None = None, selector: str = "") -> AsyncIterator[Page]:
        """The objects in chunks, all as they were at one moment. There is at least one page, perhaps empty."""
        token = ""
        while True:
            query = {"limit": self._chunk, "labelSelector": selector, "continue": token}
            page = await self._transport.call(
                Request(
                    method="GET",
                    path=path(kind, namespace),
                    kind=kind,
                    query={k: v for k, v in query.items() if v},
                )
            )
            # items of a list carry neither apiVersion nor kind
            items = [{"apiVersion": api_version(kind), "kind": kind, **item} for item in page.get("items") or ()]
            yield Page(items, str(page["metadata"]["resourceVersion"]))
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def get(self, kind: str, *, namespace: str, name: str) -> Obj | None:
        try:
            return await self._transport.call(Request(method="GET", path=path(kind, namespace, name), kind=kind))
        except ApiError as e:
            if e.not_found:
                return None
            raise

    async def ends(self, namespace: str) -> bool:
        """Whether the namespace is being deleted, or gone. A Role inside it can give the right to ask."""
        try:
            found = await self._transport.call(
                Request(method="GET", path=path("Namespace", None, namespace), kind="Namespace")
            )
        except ApiError as e:
            if e.not_found:
                return True
            raise
        return "deletionTimestamp" in found["metadata"]

    async def create(self, body: Obj) -> Obj | None:
        """Create-once. None: it is there already, after a crash or because the cache lags."""
        kind = body["kind"]
        where = path(kind, body["metadata"]["namespace"])
        try:
            return await self._transport.call(Request(method="POST", path=where, kind=kind, body=body, query=_STRICT))
        except ApiError as e:
            if e.already_exists:
                return None
            raise

    async def apply(self, body: Obj) -> Obj:
        """Server-side apply, forced. Makes the object if it is absent."""
        head = body["metadata"]
        where = path(body["kind"], head["namespace"], head["name"])
        return await self._patch(where, kind=body["kind"], body=body, content_type=APPLY_PATCH)

    async def patch(self, kind: str, *, namespace: str, name: str, body: Obj | list[Obj]) -> Obj:
        """Merge patch (an object) or JSON patch (a list) of the main resource; preconditions are inside `body`."""
        content_type = JSON_PATCH if isinstance(body, list) else MERGE_PATCH
        return await self._patch(path(kind, namespace, name), kind=kind, body=body, content_type=content_type)

    async def status(self, kind: str, *, namespace: str, name: str, version: str, patch: Obj) -> Obj:
        """Merge patch of the status of the object as it was at resourceVersion `version`; 409 if it changed since."""
        body = {"metadata": {"resourceVersion": version}, "status": patch}
        where = path(kind, namespace, name, "status")
        return await self._patch(where, kind=kind, body=body, content_type=MERGE_PATCH)

    async def delete(self, kind: str, *, namespace: str, name: str, uid: str, policy: str = "Foreground") -> bool:
        """False: that object is gone already, or the name belongs to another one by now."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy, "preconditions": {"uid": uid}}
        try:
            await self._transport.call(Request(method="DELETE", path=path(kind, namespace, name), kind=kind, body=body))
        except ApiError as e:
            if e.not_found or e.conflict:
                return False
            raise
        return True

    async def replace(self, body: Obj) -> Obj:
        """PUT of a whole object; 409 unless `body` carries its newest resourceVersion."""
        where = path(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._transport.call(Request(method="PUT", path=where, kind=body["kind"], body=body))

    async def review_token(self, token: str, audience: str) -> Obj:
        """Status of a TokenReview."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        where = "/apis/authentication.k8s.io/v1/tokenreviews"
        review = await self._transport.call(Request(method="POST", path=where, kind="TokenReview", body=body))
        return dict(review.get("status", {}))

    async def serves(self, kind: str) -> bool:
        """Whether the API server knows the kind at all (JobSet may not be installed)."""
        group, version = group_version(kind)
        where = f"/apis/{group}/{version}" if group else f"/api/{version}"
        try:
            found = await self._transport.call(Request(method="GET", path=where, kind="APIResourceList"))
        except ApiError as e:
            if e.not_found:
                return False
            raise
        return any(r.get("name") == resource(kind).plural for r in found.get("resources", ()))

    async def _patch(self, where: str, *, kind: str, body: Obj | list[Obj], content_type: str) -> Obj:
        force = {"force": "true"} if content_type == APPLY_PATCH else {}
        return await self._transport.call(
            Request(method="PATCH", path=where, kind=kind, body=body, query=_STRICT | force, content_type=content_type)
        )
