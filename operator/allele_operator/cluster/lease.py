"""Leader election on a Lease, with a fence that every write asks.

Own code, since the library's election (kubernetes.aio 37.0.1) cannot create its Lease, has no request timeout, ends on
the first transport error, lets a leader that sees another holder work on for the whole renew deadline, goes on renewing
when the leading task has died, and never releases. The rules here:

- the fence is open while less than `renew_deadline` seconds passed since the *start* of the last successful renewal;
- whoever has led and then sees another holder, or the fence shut, ends the process: a restarted process knows nothing
  stale;
- a write may be in flight for its timeout beyond the fence, so preconditions and create-once names stay necessary.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.kinds import Obj, api_version
from allele_operator.cluster.kube import Kube

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process leads, or may lead by now."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds. renew_deadline + longest write should stay near `duration`; retry far below renew_deadline."""

    duration: float
    renew_deadline: float
    retry: float


class Lease:
    """One candidate. `acquire` returns when it leads; `keep` then renews and raises LeaseLost when it must stop.

    `kube` must have a connection pool of its own, so that a renewal never waits behind other requests, and no fence.
    """

    def __init__(
        self,
        kube: Kube,
        *,
        namespace: str,
        name: str,
        identity: str,
        times: Times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._times = times
        self._clock = clock
        self._renewed = float("-inf")
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = float("-inf")
        self.identity = identity
        self.leading = False

    @property
    def holder(self) -> str:
        """Identity of the last holder seen; empty when nobody holds the lease."""
        return self.identity if self.leading else self._seen[0]

    def valid(self) -> bool:
        """The fence. The monotonic clock runs on while the process is stopped."""
        return self._clock() - self._renewed < self._times.renew_deadline

    async def acquire(self) -> None:
        while True:
            try:
                if await self._try():
                    self.leading = True
                    return
            except ApiError as e:
                log.warning("lease not reached: %s", e)
            await asyncio.sleep(self._times.retry)

    async def keep(self) -> None:
        """Renews for ever. LeaseLost when another holds it or no renewal succeeded within the deadline."""
        while True:
            await asyncio.sleep(self._times.retry)
            try:
                if not await self._try() and self.holder_changed:
                    raise LeaseLost(f"lease {self._namespace}/{self._name} is held by {self._seen[0]!r}")
            except ApiError as e:
                log.warning("lease not renewed: %s", e)
            if not self.valid():
                raise LeaseLost(f"lease {self._namespace}/{self._name} not renewed in {self._times.renew_deadline:g} s")

    @property
    def holder_changed(self) -> bool:
        return self._seen[0] not in ("", self.identity)

    async def release(self) -> None:
        """Empties the holder, so that a successor need not wait for the lease to run out. Best effort."""
        if not self.leading:
            return
        self.leading = False
        self._renewed = float("-inf")
        try:
            lease = await self._kube.get("Lease", namespace=self._namespace, name=self._name)
            if lease is not None and lease["spec"].get("holderIdentity") == self.identity:
                lease["spec"]["holderIdentity"] = ""
                await self._kube.replace({"apiVersion": api_version("Lease"), "kind": "Lease", **lease})
        except ApiError as e:
            log.warning("lease not released, the next leader waits for it to run out: %s", e)

    async def _try(self) -> bool:
        start = self._clock()
        lease = await self._kube.get("Lease", namespace=self._namespace, name=self._name)
        if lease is None:
            return await self._write(self._kube.create, self._body({}, taken=True), start=start)
        spec = lease.get("spec", {})
        self._watch(spec)
        mine = spec.get("holderIdentity") == self.identity
        if not mine and not self._expired(spec):
            return False
        if self.leading and not mine:  # it ran out, or was released by a stranger: others may have led in between
            raise LeaseLost(f"lease {self._namespace}/{self._name} was taken away")
        body = self._body(spec, taken=not mine)
        body["metadata"]["resourceVersion"] = lease["metadata"]["resourceVersion"]
        return await self._write(self._kube.replace, body, start=start)

    async def _write(self, write: Callable[[Obj], Awaitable[Obj | None]], body: Obj, *, start: float) -> bool:
        try:
            answer = await write(body)
        except ApiError as e:
            if e.conflict:  # another candidate was faster
                return False
            raise
        if answer is None:
            return False
        self._renewed = start
        self._watch(body["spec"])
        return True

    def _watch(self, spec: Obj) -> None:
        """A lease runs out when *we* saw no change for its duration: no clock is compared with another machine's."""
        now = (spec.get("holderIdentity") or "", spec.get("renewTime") or "")
        if now != self._seen:
            self._seen, self._seen_at = now, self._clock()

    def _expired(self, spec: Obj) -> bool:
        if not spec.get("holderIdentity"):
            return True
        return self._clock() - self._seen_at >= float(spec.get("leaseDurationSeconds") or self._times.duration)

    def _body(self, spec: Obj, *, taken: bool) -> Obj:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": api_version("Lease"),
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": int(self._times.duration),
                "renewTime": now,
                "acquireTime": now if taken else spec.get("acquireTime", now),
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (1 if taken and spec else 0),
            },
        }
