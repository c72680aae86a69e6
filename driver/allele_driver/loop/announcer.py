"""Telling gateways which revisions are sampled next, so that they load them while the driver does something else.

Nothing waits for it and nothing depends on it: what was not loaded ahead is loaded when it is sampled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from allele.protocol.serving import Target
from allele_driver.metrics import PREFETCH_FAILURES
from allele_driver.sampling import Gateways

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
MOST_SECONDS = 3600.0


def lease(step_seconds: float) -> float:
    """Seconds for which gateways keep what is announced: long enough for two steps like the last one."""
    return min(MOST_SECONDS, LEASE_SECONDS + 2 * step_seconds)


class Announcer:
    """Announcements of one run; a new one takes the place of the last."""

    def __init__(self, gateways: Gateways, *, run: str) -> None:
        self._gateways = gateways
        self._run = run
        self._task: asyncio.Task[None] | None = None

    def announce(self, targets: Sequence[Target], *, version: int, step_seconds: float) -> None:
        """`version`: of the catalogue that holds these revisions."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._tell(targets, version, lease(step_seconds)))

    async def cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell(self, targets: Sequence[Target], version: int, seconds: float) -> None:
        try:
            await self._gateways.prefetch(targets, run=self._run, version=version, seconds=seconds)
        except OSError as e:  # no replica's name resolves
            PREFETCH_FAILURES.inc()
            log.info("nothing is loaded ahead: %s", e)
