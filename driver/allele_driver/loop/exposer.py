"""Probing new revisions while the next step samples; what passed is exposed by the next commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from allele.protocol.progress import Probes
from allele.protocol.serving import Gate, Target
from allele.store import Fact, Index
from allele_driver.exposure import Verdict, combined, probes
from allele_driver.loop.stages import Stages
from allele_driver.metrics import EXPOSURE_GAP, VERDICTS
from allele_driver.sampling import Gateways

log = logging.getLogger(__name__)


class Exposer:
    """At most one probe at a time: `begin` after a commit, `finish` before the next."""

    def __init__(self, gateways: Gateways, gate: Gate) -> None:
        self.gateways = gateways
        self.gate = gate
        self._task: asyncio.Task[list[Verdict]] | None = None
        self.max_gap: float | None = None
        """Largest gap of any revision that this driver has probed."""
        self.verdicts: Sequence[Verdict] = ()
        """Of the probe that was finished last."""
        self._failing: dict[str, Verdict] = {}
        """By member, whose newest probe did not pass."""
        self._probed = False

    @property
    def state(self) -> Probes | None:
        """What to report; None before the first verdict."""
        return probes(list(self._failing.values()), gate=self.gate) if self._probed else None

    def begin(self, targets: Sequence[Target], *, version: int, stages: Stages) -> None:
        """Ask all replicas for verdicts on revisions that catalogue `version` holds."""
        assert self._task is None, "finish comes before the next begin"
        if targets:
            self._task = asyncio.create_task(self._probe(targets, version, stages))

    async def finish(self, index: Index, *, abandoned: Sequence[Fact] = ()) -> list[Fact]:
        """Exposed facts of what passed and is neither held back nor abandoned meanwhile, or now."""
        self.verdicts = ()
        if self._task is None:
            return []
        try:
            self.verdicts = await self._task
        finally:
            self._task = None
        self._note(self.verdicts)
        gone = {(f.member, f.revision) for f in abandoned}
        return [
            Fact(kind="Exposed", member=v.member, revision=v.revision, metrics=v.metrics)
            for v in self.verdicts
            if v.passed
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
            return combined(await self.gateways.probe(targets, gate=self.gate, version=version))

    def _note(self, verdicts: Sequence[Verdict]) -> None:
        for v in verdicts:
            VERDICTS.labels(v.refusal or "Passed").inc()
            if v.max_gap is not None:
                self.max_gap = max(self.max_gap or 0.0, v.max_gap)
                EXPOSURE_GAP.set(v.max_gap)
            self._failing.pop(v.member, None)
            if not v.passed:
                self._failing[v.member] = v
        self._probed = self._probed or bool(verdicts)
        failed = [v for v in verdicts if not v.passed]
        if failed:
            log.warning("%s", probes(failed, gate=self.gate).message, extra={"failed": len(failed)})
