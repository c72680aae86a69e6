"""The kopf part: one `on.event` handler per kind that hands the object to the reconciler.

Nothing else of kopf is used. Its indexes are quadratic in the number of objects, its timers and daemons cost a task per
object, its peering freezes both replicas, and its persistence marks users' objects (measured with 1.45.2).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from allele_operator.cluster.kinds import group_version, resource
from allele_operator.planning.model import ROLE_LABEL, Obj

OnEvent = Callable[[str, Obj, bool], None]
"""Called with kind, raw object, and whether it was deleted."""


def kopf_settings(children: Sequence[str]) -> kopf.OperatorSettings:
    """Each with its reason; `children` are watched only where they carry our label, filtered by the server."""
    s = kopf.OperatorSettings()
    # a worker keeps its place for idle_timeout after the last event: the default 5 s would mean 20 objects a second
    s.queueing.worker_limit, s.queueing.idle_timeout = 100, 0.01
    s.watching.chunk_size = 500  # memory of the first listing
    s.watching.server_timeout, s.watching.client_timeout = 300, 310  # the server ends a watch first, cleanly
    s.watching.inactivity_timeout = 70  # bookmarks come each minute: a silent stall is noticed
    s.watching.connect_timeout = 5
    s.networking.request_timeout = 30
    s.scanning.disabled = True  # no watch of CRDs and namespaces: fewer rights
    s.posting.enabled = False  # our own events have reasons and are counted up
    s.process.ultimate_exiting_timeout = 20
    for kind in children:
        group, version = group_version(kind)
        selector: Any = tuple(w for w in (group, version, resource(kind).plural) if w)
        s.watching.label_selectors[selector] = ROLE_LABEL  # a bare key: the label exists
    return s


def registry(
    *, kinds: Sequence[str], on_event: OnEvent, login: Callable[[], Awaitable[kopf.ConnectionInfo]]
) -> kopf.OperatorRegistry:
    reg = kopf.OperatorRegistry()

    @kopf.on.login(registry=reg)
    async def authenticate(**_: Any) -> kopf.ConnectionInfo:
        return await login()

    for kind in kinds:
        group, version = group_version(kind)
        where = [w for w in (group, version, resource(kind).plural) if w]
        kopf.on.event(*where, registry=reg, id=f"on-{kind.lower()}")(_handler(kind, on_event))
    return reg


def _handler(kind: str, on_event: OnEvent) -> Callable[..., Any]:
    async def handle(event: Any, **_: Any) -> None:  # async: a plain def would go to a pool of threads
        on_event(kind, {**event["object"], "kind": kind}, event["type"] == "DELETED")

    return handle


async def connection(conf: Configuration) -> kopf.ConnectionInfo:
    """kopf's credentials from the client's, so that both follow one kubeconfig and one rotation of the token.

    kopf asks again after each 401, which is when a pod's token has been rotated.
    """
    if conf.refresh_api_key_hook is not None:
        refreshed = conf.refresh_api_key_hook(conf)
        if inspect.isawaitable(refreshed):
            await refreshed
    key = conf.api_key.get("BearerToken", "")
    ca_data = conf.ca_cert_data
    return kopf.ConnectionInfo(
        server=conf.host,
        ca_path=None if ca_data else conf.ssl_ca_cert,
        ca_data=ca_data,
        insecure=not conf.verify_ssl,
        token=key.split(" ")[-1] or None,
        certificate_path=conf.cert_file,
        private_key_path=conf.key_file,
    )


async def watch(
    *,
    registry: kopf.OperatorRegistry,
    settings: kopf.OperatorSettings,
    namespaces: Sequence[str],
    stop: asyncio.Event,
    started: Callable[[], None],
) -> None:
    """Runs until `stop`, and at its end cancels every task that is younger than itself: start yours before it.

    kopf takes SIGTERM and SIGINT for itself; `started` is called right after, to take them back.
    """
    older = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=registry,
        settings=settings,
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )
    started()
    await kopf.run_tasks(tasks, ignored=older)
