"""The newest report of each run and gateway. Losing all loses nothing: the next one carries the whole state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from allele.protocol.errors import StaleEpoch
from allele.protocol.progress import Progress
from allele.protocol.serving import GatewayStatus
from allele_operator.planning.gateways import STALE
from allele_operator.planning.model import GatewaySeen


class Reports:
    def __init__(self) -> None:
        self._newest: dict[str, Progress] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def get(self, uid: str) -> Progress | None:
        return self._newest.get(uid)

    def accept(self, report: Progress) -> bool:
        """True when it tells something new. StaleEpoch: it is from a driver that another one has replaced."""
        last = self._newest.get(report.uid)
        if last is not None and report.epoch < last.epoch:
            raise StaleEpoch(
                f"run {report.namespace}/{report.run}: expected epoch {last.epoch} or later, found {report.epoch}: "
                "a newer driver has taken over"
            )
        self._newest[report.uid] = report
        return report != last

    def forget(self, uid: str) -> None:
        self._newest.pop(uid, None)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class GatewayReports:
    """Of each pool, by the uid of the pod."""

    def __init__(self, now: Callable[[], datetime] = _utc_now) -> None:
        self._now = now
        self._newest: dict[str, dict[str, GatewaySeen]] = {}

    def of(self, pool_uid: str) -> list[GatewaySeen]:
        return list(self._newest.get(pool_uid, {}).values())

    def accept(self, pool_uid: str, pod_uid: str, status: GatewayStatus) -> bool:
        """True when it tells something new: that a gateway is still there is no news, but keeps it from being stale."""
        known = self._newest.setdefault(pool_uid, {})
        last = known.get(pod_uid)
        known[pod_uid] = GatewaySeen(pod_uid, self._now(), status)
        return last is None or last.status != status or self._now() - last.at >= STALE

    def forget(self, uid: str) -> None:
        """A pool or a pod that is gone."""
        self._newest.pop(uid, None)
        for pods in self._newest.values():
            pods.pop(uid, None)
