"""The newest report of each run. Losing all of them loses nothing: the next report carries the whole state."""

from __future__ import annotations

from allele.protocol.errors import StaleEpoch
from allele.protocol.progress import Progress


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
