"""Events (events.k8s.io/v1) about our objects: what `kubectl describe` shows below the conditions.

The name is a hash of object, reason and note, so that a repetition, or a restart of the operator, counts up the series
of the one event instead of adding another. Events are best effort: losing one is counted, never retried.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.kinds import Obj, api_version
from allele_operator.cluster.kube import Kube

log = logging.getLogger(__name__)
_NOTE_CHARACTERS = 1024  # the API's limit
_REMEMBERED = 4096


class EventRecorder:
    """Writes events; the same one again within `quiet` seconds is dropped.

    `home` is the operator's own Lease: what outlives a namespace that is being deleted, and takes no events any more,
    is told about that.
    """

    def __init__(
        self,
        kube: Kube,
        *,
        instance: str,
        home: Obj | None = None,
        quiet: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._kube = kube
        self._instance = instance[:128]
        self._home = home
        self._quiet = quiet
        self._clock = clock
        self._lost = lost
        self._said: OrderedDict[str, float] = OrderedDict()

    async def record(
        self,
        kind: str,
        obj: Obj,
        *,
        type: str,
        reason: str,
        message: str,
        action: str,
        outlives: bool = False,
        flickers: bool = False,
    ) -> None:
        """`type` is Normal or Warning; `action` is what the operator was doing. One that `flickers` is the same one
        whatever its message says."""
        head = obj["metadata"]
        name = event_name(head["name"], head.get("uid", ""), reason, message)
        if self._said_lately(event_name(head["name"], head.get("uid", ""), reason) if flickers else name):
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body = {
            "apiVersion": api_version("Event"),
            "kind": "Event",
            "metadata": {"name": name, "namespace": head["namespace"]},
            "eventTime": now,
            "reportingController": "allele.dev/operator",
            "reportingInstance": self._instance,
            "action": action,
            "reason": reason,
            "note": message[:_NOTE_CHARACTERS],
            "type": type,
            "regarding": {
                "apiVersion": api_version(kind),
                "kind": kind,
                "name": head["name"],
                "namespace": head["namespace"],
            }
            | ({"uid": head["uid"]} if head.get("uid") else {}),
        }
        try:
            if await self._kube.create(body) is None:
                await self._count_up(head["namespace"], name, now)
        except ApiError as e:
            if outlives and e.terminating and self._home is not None:
                log.warning("%s", message, extra={"namespace": head["namespace"]})
                await self.record(
                    self._home["kind"], self._home, type=type, reason=reason, message=message, action=action
                )
                return
            log.info("event lost: %s", e)
            self._lost()

    def _said_lately(self, what: str) -> bool:
        """Whether it was said within `quiet` seconds; else it counts as said now."""
        if self._clock() - self._said.get(what, float("-inf")) < self._quiet:
            return True
        self._said[what] = self._clock()
        self._said.move_to_end(what)
        if len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)
        return False

    async def _count_up(self, namespace: str, name: str, now: str) -> None:
        old = await self._kube.get("Event", namespace=namespace, name=name)
        if old is None:  # it expired in between
            return
        count = int((old.get("series") or {}).get("count", 1)) + 1
        series = {"series": {"count": count, "lastObservedTime": now}}
        await self._kube.patch("Event", namespace=namespace, name=name, body=series)


def event_name(name: str, *parts: str) -> str:
    return f"{name}.{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
