"""Probing new revisions while the next step samples; what passed is exposed by the next commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from allele.protocol.serving import Gate, Target
from allele.store import Fact, Index
from allele_driver.exposure import Verdict, combined
from allele_driver.loop.stages import Stages
from allele_driver.metrics import EXPOSURE_GAP, VERDICTS
from allele_driver.sampling import Gateways

log = logging.getLogger(__name__)


class Exposer:
    """At most one probe at a time: `begin` after a commit, `finish` before the next."""

    def __init__(self, gateways: Gateways, gate: Gate) -> None:
        self._gateways = gateways
        self._gate = gate
        self._task: asyncio.Task[list[Verdict]] | None = None
        self.max_gap: float | None = None
        """Largest gap of any revision that this driver has probed."""
        self.failure = ""
        """What the last failing probe said; empty when the newest ones passed."""

    def begin(self, targets: Sequence[Target], *, version: int, stages: Stages) -> None:
        """Ask all replicas for verdicts on revisions that catalogue `version` holds."""
        assert self._task is None, "finish comes before the next begin"
        if targets:
            self._task = asyncio.create_task(self._probe(targets, version, stages))

    async def finish(self, index: Index, *, abandoned: Sequence[Fact] = ()) -> list[Fact]:
        """Exposed facts of what passed and is neither held back nor abandoned meanwhile, or now."""
        if self._task is None:
            return []
        try:
            verdicts = await self._task
        finally:
            self._task = None
        self.failure = ""
        gone = {(f.member, f.revision) for f in abandoned}
        return [
            Fact(kind="Exposed", member=v.member, revision=v.revision, metrics=v.metrics)
            for v in verdicts
            if self._passed(v)
            and index.hold(v.member) is None
            and not index.is_abandoned(v.member, v.revision)
            and (v.member, v.revision) not in gone
        ]

    async def cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _probe(self, targets: Sequence[Target], version: int, stages: Stages) -> list[Verdict]:
        with stages("probe"):
            return combined(await self._gateways.probe(targets, gate=self._gate, version=version))

    def _passed(self, verdict: Verdict) -> bool:
        VERDICTS.labels(verdict.verdict).inc()
        if verdict.max_gap is not None:
            self.max_gap = max(self.max_gap or 0.0, verdict.max_gap)
            EXPOSURE_GAP.set(verdict.max_gap)
        if not verdict.passed:
            self.failure = (
                f"probe of {verdict.member}@{verdict.revision}: {verdict.verdict}: {verdict.message}; "
                "the revision before stays exposed"
            )
            fields = {"member": verdict.member, "revision": verdict.revision, "max_gap": verdict.max_gap}
            log.warning("%s", self.failure, extra=fields)
        return verdict.passed
