"""Observe, plan, execute, one status write, events: the loop around the pure plans.

    kopf events ─┐
    listings ────┼─► Cache ──changed──► queue: the object and its dependents
    own answers ─┘                        │
    progress reports ─────────────────────┤
                                          ▼
                      plan(kind, obj, world, now) ─► actions ─► status ─► events

Level-based: a reconcile looks only at what is now, so lost, doubled and late events do no harm.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable

from allele_operator.cache import Cache
from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.events import EventRecorder
from allele_operator.cluster.kube import Kube
from allele_operator.execute import Executor, NameTaken, WorldChanged
from allele_operator.metrics import Metrics
from allele_operator.planning import observe
from allele_operator.planning.model import ERASE_FINALIZER, PLANNED, Obj, Plan, Ref
from allele_operator.planning.plan import dependents, plan
from allele_operator.status import merge_patch, urgent
from allele_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Reconciler:
    """Keeps cache and queue together; `reconcile` is what the queue's workers run.

    `forget` is told the uid of each object that is gone.
    """

    def __init__(
        self,
        *,
        kube: Kube,
        cache: Cache,
        queue: WorkQueue[Ref],
        events: EventRecorder,
        metrics: Metrics,
        status_interval: float,
        forget: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = _utc_now,
    ) -> None:
        self._kube = kube
        self._cache = cache
        self._queue = queue
        self._events = events
        self._metrics = metrics
        self._interval = status_interval
        self._forget = forget
        self._clock = clock
        self._now = now
        self._written: dict[str, float] = {}
        self._execute = Executor(kube, cache, self)

    def seen(self, raw: Obj) -> bool:
        """An object as the API server sent it. True when it told something new."""
        change = self._cache.put(raw["kind"], raw)
        if change is None:
            return False
        new, old = change
        self._notify(new)
        if old is not None:  # whoever depended on the old state, e.g. on a label that changed
            self._notify(old)
        return True

    def gone(self, ref: Ref, *, uid: str) -> None:
        old = self._cache.remove(ref, uid=uid)
        if old is not None:
            self.forgotten(old)

    def forgotten(self, old: Obj) -> None:
        """An object that left the cache."""
        self._written.pop(old["metadata"]["uid"], None)
        self._forget(old["metadata"]["uid"])
        self._notify(old)

    def enqueue_all(self) -> None:
        for ref in self._cache.refs(*PLANNED):
            self._queue.add(ref)

    def reported(self, ref: Ref) -> None:
        """A run's driver told its progress: the run and who shows its numbers."""
        obj = self._cache.get(ref)
        if obj is not None:
            self._notify(obj)

    def _notify(self, obj: Obj) -> None:
        kind = obj["kind"]
        if kind in PLANNED:
            self._queue.add(Ref.of(obj))
        for ref in dependents(kind, obj, self._cache):
            self._queue.add(ref)

    async def reconcile(self, ref: Ref) -> None:
        start, result = self._clock(), "error"
        try:
            obj = await self._observe(ref)
            if obj is None:
                result = "gone"
                return
            decided = plan(ref.kind, obj, self._cache, self._now())
            refused = await self._act(decided)
            result = await self._finish(ref, obj, decided)
            if refused is not None:
                result = "refused"
                await self._tell(obj, refused)
                raise refused
        except WorldChanged as e:
            log.info("%s: %s", ref, e)
            result = "again"
            self._queue.add(ref)
        finally:
            self._metrics.reconciled(ref.kind, result=result, seconds=self._clock() - start)

    async def _observe(self, ref: Ref) -> Obj | None:
        """The object, after a look at what its plan must know and no watch tells."""
        obj = self._cache.get(ref)
        if obj is None or not observe.deleting(obj) or ERASE_FINALIZER not in obj["metadata"]["finalizers"]:
            return obj
        try:
            self._cache.ending(ref.namespace, ends=await self._kube.ends(ref.namespace))
        except ApiError as e:
            if e.status == 403:
                await self._tell(obj, e)
            raise
        return self._cache.get(ref)

    async def _act(self, decided: Plan) -> NameTaken | ApiError | None:
        """Runs the actions. Gives the error that will not go away by itself (quota, policy, webhook, a name taken):
        then the status is still worth writing. Other errors are raised."""
        for action in decided.actions:
            try:
                await self._execute.run(action)
            except NameTaken as e:
                return e
            except ApiError as e:
                if e.status not in (400, 403, 422):
                    raise
                return e
        return None

    async def _tell(self, obj: Obj, error: NameTaken | ApiError) -> None:
        reason = "NameTaken" if isinstance(error, NameTaken) else "Refused"
        await self._events.record(
            obj["kind"], obj, type="Warning", reason=reason, message=str(error), action="Reconcile"
        )

    async def _finish(self, ref: Ref, planned: Obj, decided: Plan) -> str:
        if decided.requeue is not None:
            self._queue.add_later(ref, seconds=decided.requeue)
        obj = self._cache.get(ref)
        head = planned["metadata"]
        if obj is None or obj["metadata"]["uid"] != head["uid"]:
            return "gone"
        if obj["metadata"].get("generation") != head.get("generation"):
            return "again"  # the spec moved on under the plan; its event has queued the object
        if decided.status is not None and not await self._write_status(ref, obj, decided.status):
            return "deferred"
        for event in decided.events:
            await self._events.record(
                ref.kind,
                obj,
                type=event.type,
                reason=event.reason,
                message=event.message,
                action="Reconcile",
                outlives=event.outlives,
                flickers=event.flickers,
            )
        return "ok"

    async def _write_status(self, ref: Ref, obj: Obj, status: Obj) -> bool:
        """False when the write waits for its interval; events of a status come only with it."""
        old = obj.get("status") or {}
        patch = merge_patch(old, status)
        if not patch:
            return True
        uid = obj["metadata"]["uid"]
        wait = self._written.get(uid, float("-inf")) + self._interval - self._clock()
        if wait > 0 and not urgent(old, status):
            self._queue.add_later(ref, seconds=wait)
            return False
        version = obj["metadata"]["resourceVersion"]
        try:
            answer = await self._kube.status(
                ref.kind, namespace=ref.namespace, name=ref.name, version=version, patch=patch
            )
        except ApiError as e:
            if not e.not_found:
                raise
            self.gone(ref, uid=uid)
            return False
        self._written[uid] = self._clock()
        self.seen(answer)
        return True
