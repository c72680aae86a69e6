"""URL paths of the kinds that the operator reads or writes; where each lives is said in `planning.model`."""

from __future__ import annotations

from allele_operator.planning import model
from allele_operator.planning.model import Obj, Resource

__all__ = ["Obj", "Resource", "api_version", "group_version", "path", "resource"]

_RESOURCES = {
    **model.RESOURCES,
    "Event": Resource("events.k8s.io/v1", "events"),
    "Namespace": Resource("v1", "namespaces"),
    "Lease": Resource("coordination.k8s.io/v1", "leases"),
}


def resource(kind: str) -> Resource:
    try:
        return _RESOURCES[kind]
    except KeyError:
        raise LookupError(f"kind {kind!r} is not one of {', '.join(_RESOURCES)}") from None


def api_version(kind: str) -> str:
    return resource(kind).api_version


def group_version(kind: str) -> tuple[str, str]:
    """Group and version; the core group is ''."""
    group, _, version = resource(kind).api_version.rpartition("/")
    return group, version


def path(kind: str, namespace: str | None = None, *parts: str) -> str:
    """Path of the collection, or with a name (and subresource) of one object."""
    where = resource(kind)
    root = "apis" if "/" in where.api_version else "api"
    scope = ("namespaces", namespace) if namespace else ()
    return "/" + "/".join((root, where.api_version, *scope, where.plural, *parts))
