"""Keeps the cache true: a full listing before anything is planned, kopf's events, and a listing now and then.

kopf lists kinds independently and never says when it has seen all, so a plan made from its first events would find runs
without their populations and pools without their JobSets. And what is deleted while its watch is broken is never told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from allele_operator.cache import Cache
from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.kube import Kube
from allele_operator.metrics import Metrics
from allele_operator.planning.model import CHILDREN, PLANNED, ROLE_LABEL, Obj, Ref
from allele_operator.reconcile import Reconciler

log = logging.getLogger(__name__)


class Watching:
    """`namespaces` empty: all. `kinds` are those that exist in this cluster."""

    def __init__(
        self,
        *,
        kube: Kube,
        cache: Cache,
        reconciler: Reconciler,
        metrics: Metrics,
        kinds: Sequence[str],
        namespaces: Sequence[str],
    ) -> None:
        self._kube = kube
        self._cache = cache
        self._reconciler = reconciler
        self._metrics = metrics
        self._kinds = kinds
        self._namespaces: Sequence[str | None] = namespaces or (None,)

    def on_event(self, kind: str, raw: Obj, deleted: bool) -> None:
        self._metrics.watched(kind)
        if deleted:
            head = raw["metadata"]
            self._reconciler.gone(Ref(kind, head["namespace"], head["name"]), uid=head["uid"])
        else:
            self._reconciler.seen(raw)

    async def list_all(self) -> None:
        """Children first: an object of ours then meets a complete world when the queue gets to it."""
        for kind in sorted(self._kinds, key=lambda k: k in PLANNED):
            for namespace in self._namespaces:
                await self._list(kind, namespace)

    async def _list(self, kind: str, namespace: str | None) -> None:
        listed: set[str] = set()
        version = ""
        async for page in self._kube.pages(kind, namespace=namespace, selector=ROLE_LABEL if kind in CHILDREN else ""):
            version = page.version
            for raw in page.items:
                listed.add(raw["metadata"]["uid"])
                self._reconciler.seen(raw)
        for old in self._cache.settle(kind, listed=listed, version=version, namespace=namespace):
            log.info("%s %s was deleted unseen", kind, old["metadata"]["name"])
            self._reconciler.forgotten(old)

    async def resync(self, *, first: float, every: float) -> None:
        """For ever; the first one soon after kopf began, for what was deleted between our listing and kopf's."""
        await asyncio.sleep(first)
        while True:
            try:
                await self.list_all()
                self._reconciler.enqueue_all()
            except ApiError as e:
                log.warning("listing failed, again in %g s: %s", every, e)
            await asyncio.sleep(every)
