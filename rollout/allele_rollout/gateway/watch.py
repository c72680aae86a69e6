"""Whether the engine really answers, and which start of it we are talking to.

    Starting ──answers──► (unload what an earlier gateway left) ──► Ready ──no answer──► Failed ──answers──► …

An engine that restarts has forgotten every adapter while its names still look loaded here, so each new boot empties the
residency. An open port proves nothing: readiness is a generated token, or any answer of a forward pass of late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Literal

from allele.protocol.errors import ProtocolError, Unavailable
from allele_rollout.gateway.client import EngineClient, EngineInfo

State = Literal["Starting", "Ready", "Failed"]
_log = logging.getLogger(__name__)


class EngineWatch:
    """Follows one engine; `run` is its background task."""

    def __init__(
        self,
        engine: EngineClient,
        *,
        on_boot: Callable[[], None],
        interval: float = 2.0,
        patience: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._on_boot = on_boot
        self._interval = interval
        self._patience = patience
        self._clock = clock
        self._wake = asyncio.Event()
        self._problem = "not asked yet"
        self.state: State = "Starting"
        self.info: EngineInfo | None = None

    def require(self) -> None:
        """Raises Unavailable unless the engine answers."""
        if self.state != "Ready":
            raise Unavailable(f"engine: expected Ready, found {self.state}: {self._problem}", retry_after=2.0)

    def suspect(self) -> None:
        """A request met a dead engine: unhealthy at once, not at the next look."""
        if self.state == "Ready":
            self.state, self._problem = "Failed", "a request got no answer"
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                await self._look()
            except ProtocolError as e:
                if self.state == "Ready":
                    self.state = "Failed"
                if str(e) != self._problem:
                    _log.warning("The engine is not ready: %s", e)
                self._problem = str(e)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._interval)
            self._wake.clear()

    async def _look(self) -> None:
        if self.state == "Ready" and self._clock() - self._engine.last_answer < self._interval:
            return
        info = await self._engine.info()
        if self.info is None or info.boot != self.info.boot:
            await self._attach(info)
        await self._engine.answers(within=self._patience)
        self.state = "Ready"

    async def _attach(self, info: EngineInfo) -> None:
        self.state = "Starting"
        self._on_boot()
        for name in await self._engine.adapters():
            await self._engine.unload(name)
        self.info = info
        _log.info("Attached to engine %s", info.version)
