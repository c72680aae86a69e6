"""Whether the engine really answers, and which start of it we are talking to.

    Starting ──answers──► attach: adapters in, strangers out ──► Ready ──no answer──► Failed ──answers──► …

An engine that restarts has forgotten every adapter while its names still look loaded here, so each new boot is attached
to: what was resident is put in again. An open port proves nothing:
readiness is a generated token, or any answer of a forward pass of late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from allele.protocol.errors import ProtocolError, Unavailable
from allele_rollout.gateway.client import EngineClient, EngineInfo

State = Literal["Starting", "Ready", "Failed"]
_log = logging.getLogger(__name__)
RESTART = 180.0
"""Seconds that a request which may be repeated waits for an engine that restarts."""


class EngineWatch:
    """Follows one engine; `run` is its background task."""

    def __init__(
        self,
        engine: EngineClient,
        *,
        attach: Callable[[], Awaitable[None]],
        interval: float = 2.0,
        patience: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._attach_to = attach
        self._interval = interval
        self._patience = patience
        self._clock = clock
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
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

    async def again(self, *, within: float = RESTART) -> None:
        """The engine does not know what was loaded, or was gone: return when it is attached to again.

        Raises Unavailable when that takes too long.
        """
        if self.state == "Ready":
            self.state, self._problem, self.info = "Failed", "it lost its adapters", None
        self._wake.set()
        deadline = self._clock() + within
        while not self._is_ready() and self._clock() < deadline:
            self._ready.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), self._interval)
        self.require()

    def _is_ready(self) -> bool:
        return self.state == "Ready"

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
        self._ready.set()

    async def _attach(self, info: EngineInfo) -> None:
        self.state = "Starting"
        await self._attach_to()
        self.info = info
        _log.info("Attached to engine %s", info.version)
