"""Who is calling, and may it report this run, or this pool?

Their pods have no other credential than a projected token for our audience. The API server's TokenReview says which pod
it was given to; the cache says whose pod that is. A label would not do: anyone who may make pods can set labels.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from allele.protocol.errors import Overloaded, ProtocolError, Unavailable
from allele.protocol.progress import Progress
from allele.protocol.serving import GatewayReport
from allele_operator.cluster.errors import ApiError
from allele_operator.cluster.kube import Kube
from allele_operator.planning.model import ROLE_LABEL, Obj, Ref, World

_EXTRA = "authentication.kubernetes.io/"
_REMEMBERED = 10_000
_REVIEWS_AT_ONCE = 4
_REVIEWS_WAITING = 64


class Unauthenticated(ProtocolError):
    """No token, or one that the API server does not accept for our audience."""

    status = 401


class Forbidden(ProtocolError):
    """A valid token of a pod that has no part in what it reports."""

    status = 403


@dataclass(frozen=True)
class Caller:
    namespace: str
    pod: str
    pod_uid: str


class Reviewer:
    """TokenReview with a memory of `ttl` seconds: a token whose pod is gone is refused at most that much late.

    Refusals are not remembered: a flood of garbage is bounded by the reviews that may wait.
    """

    def __init__(
        self, kube: Kube, *, audience: str, ttl: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube = kube
        self._audience = audience
        self._ttl = ttl
        self._clock = clock
        self._known: dict[str, tuple[float, Caller]] = {}
        self._slots = asyncio.Semaphore(_REVIEWS_AT_ONCE)
        self._waiting = 0

    async def identify(self, token: str) -> Caller:
        """Unauthenticated, Overloaded, or Unavailable when the API server does not answer."""
        key = hashlib.sha256(token.encode()).hexdigest()
        until, caller = self._known.get(key, (0.0, None))
        if caller is not None and until > self._clock():
            return caller
        if self._waiting >= _REVIEWS_WAITING:
            raise Overloaded("too many tokens wait for a review", retry_after=5)
        self._waiting += 1
        try:
            async with self._slots:
                caller = await self._review(token)
        finally:
            self._waiting -= 1
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[key] = (self._clock() + self._ttl, caller)
        return caller

    async def _review(self, token: str) -> Caller:
        try:
            status = await self._kube.review_token(token, self._audience)
        except ApiError as e:
            raise Unavailable(f"the token could not be reviewed: {e}", retry_after=5) from e
        # an authenticator that knows no audiences answers `authenticated` without naming ours
        if not status.get("authenticated") or self._audience not in status.get("audiences", ()):
            reason = status.get("error", "not accepted")
            raise Unauthenticated(f"expected a token for audience {self._audience!r}: {reason}")
        user = status["user"]
        extra = {k: v[0] for k, v in user.get("extra", {}).items() if v}
        account = str(user["username"]).split(":")
        if account[:2] != ["system", "serviceaccount"] or not extra.get(_EXTRA + "pod-uid"):
            raise Unauthenticated(f"expected a token projected into a pod, found one of {user['username']!r}")
        return Caller(account[2], extra.get(_EXTRA + "pod-name", ""), extra[_EXTRA + "pod-uid"])


def authorise(caller: Caller, report: Progress, world: World) -> None:
    """Forbidden unless the caller is a pod of a Job that the reported run owns."""
    run = world.get(Ref("RLRun", report.namespace, report.run))
    if caller.namespace != report.namespace or run is None or run["metadata"]["uid"] != report.uid:
        raise Forbidden(
            f"expected a run of namespace {caller.namespace!r}, found {report.namespace}/{report.run} ({report.uid})"
        )
    if not _is_of(caller, world.owned(report.uid, "Job"), world):
        raise Forbidden(f"pod {caller.namespace}/{caller.pod} is not the driver of run {report.run!r}")


def authorise_gateway(caller: Caller, report: GatewayReport, world: World) -> str:
    """The pool's uid. Forbidden unless the caller is a rollout pod of that pool."""
    pool = world.get(Ref("BasePool", report.namespace, report.pool))
    if caller.namespace != report.namespace or pool is None:
        raise Forbidden(f"expected a pool of namespace {caller.namespace!r}, found {report.namespace}/{report.pool}")
    uid = str(pool["metadata"]["uid"])
    jobs = world.owned(uid, "Job")
    jobs += [j for job_set in world.owned(uid, "JobSet") for j in world.owned(job_set["metadata"]["uid"], "Job")]
    if not _is_of(caller, [j for j in jobs if j["metadata"]["labels"].get(ROLE_LABEL) == "rollout"], world):
        raise Forbidden(f"pod {caller.namespace}/{caller.pod} is not a rollout of pool {report.pool!r}")
    return uid


def _is_of(caller: Caller, jobs: Sequence[Obj], world: World) -> bool:
    """Whether the caller is a pod of one of the Jobs: by owner, which only controllers set."""
    pod = world.get(Ref("Pod", caller.namespace, caller.pod))
    owners = {o["uid"] for o in pod["metadata"]["ownerReferences"]} if pod is not None else set()
    same = pod is not None and pod["metadata"]["uid"] == caller.pod_uid
    return same and bool(owners & {j["metadata"]["uid"] for j in jobs})
