"""What this replica has proven: that it serves, under a bare name, what was trained.

The driver asks all replicas that there are when it exposes a revision. One that comes later, or whose engine has
started again, runs the stored probe itself before the first tenant gets an answer of the revision. Revisions without
a probe (imported ones) have nothing that they could be compared with and pass.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from allele.protocol.errors import NotExposed, Unavailable
from allele.protocol.serving import ProbeResult
from allele_rollout.gateway.adapter import Adapter

_log = logging.getLogger(__name__)
_REMEMBERED = 100_000
AGAIN = 30.0
"""Seconds after which a revision that failed is tried again: its bytes may have been damaged on their way."""

Probe = Callable[[Adapter], Awaitable[ProbeResult | None]]
"""Runs the stored probe of a revision; None: it has none."""


class Proofs:
    """Verdicts of one replica since its engine started."""

    def __init__(self, probe: Probe, *, on_verdict: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._probe = probe
        self._on_verdict = on_verdict
        self._clock = clock
        self._proven: OrderedDict[str, None] = OrderedDict()
        self._failed: dict[str, tuple[float, NotExposed]] = {}
        self._flights: dict[str, asyncio.Future[None]] = {}

    def forget(self) -> None:
        """The engine started again."""
        self._proven.clear()
        self._failed.clear()

    def passed(self, adapter: Adapter) -> None:
        """A driver's probe has passed here."""
        self._proven[adapter.engine_name] = None
        while len(self._proven) > _REMEMBERED:
            self._proven.popitem(last=False)

    async def require(self, adapter: Adapter) -> None:
        """Return once it is proven. Raises NotExposed when its probe fails here."""
        name = adapter.engine_name
        if name in self._proven:
            self._proven.move_to_end(name)
            return
        until, error = self._failed.get(name, (0.0, None))
        if error is not None and self._clock() < until:
            raise error
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = asyncio.ensure_future(self._prove(adapter))
            flight.add_done_callback(lambda f: (self._flights.pop(name), f.cancelled() or f.exception()))
        await asyncio.shield(flight)

    async def _prove(self, adapter: Adapter) -> None:
        result = await self._probe(adapter)
        if result is not None:
            self._on_verdict(result.verdict)
            if result.outage:
                raise Unavailable(f"{adapter.name}: {result.message}", retry_after=2.0)
            if result.verdict != "Passed":
                why = f"{adapter.name}: probe on this replica: {result.verdict}: {result.message}"
                _log.error("Not served: %s", why)
                error = NotExposed(why)
                self._failed[adapter.engine_name] = (self._clock() + AGAIN, error)
                raise error
        self._failed.pop(adapter.engine_name, None)
        self.passed(adapter)
