"""Waiting out outages of trainer, gateways and store: backoff with jitter, without end but for a stop.

A run that waits is cheaper than a run that fails: what it waits for is said in its progress and counted, and SIGTERM
ends the wait.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp

from allele.protocol.errors import Overloaded, ProtocolError, Unavailable
from allele.store import StoreUnavailable
from allele_driver.metrics import RETRIES

log = logging.getLogger(__name__)
T = TypeVar("T")

TRANSIENT = (aiohttp.ClientError, OSError, TimeoutError, Unavailable, Overloaded, StoreUnavailable)
"""Failures that the same call may not meet again."""

LOUD_AFTER = 3
"""Attempts before a wait is worth telling people."""


class Stopping(Exception):
    """The run was told to stop while it waited."""


class Patience:
    """Repeats calls until they succeed."""

    def __init__(
        self,
        *,
        stopping: asyncio.Event,
        rng: random.Random,
        on_wait: Callable[[str], None] = lambda _: None,
        first: float = 0.1,
        most: float = 15.0,
    ) -> None:
        self._stopping = stopping
        self._rng = rng
        self._on_wait = on_wait
        self._first = first
        self._most = most

    async def until(self, what: str, call: Callable[[], Awaitable[T]], *, seconds: float | None = None) -> T:
        """The result of `call`. Raises Stopping, what is not TRANSIENT, or after `seconds` what is."""
        clock = asyncio.get_running_loop().time
        end = None if seconds is None else clock() + seconds
        attempt = 0
        while True:
            try:
                result = await call()
            except TRANSIENT as e:
                if end is not None and clock() >= end:
                    raise
                attempt += 1
                await self._wait(what, attempt, e)
                continue
            if attempt >= LOUD_AFTER:
                log.info("%s answered after %d attempts", what, attempt + 1)
                self._on_wait("")
            return result

    async def _wait(self, what: str, attempt: int, error: Exception) -> None:
        RETRIES.labels(what).inc()
        delay = self._rng.uniform(0.5, 1.0) * min(self._most, self._first * 2**attempt)
        if isinstance(error, ProtocolError) and error.retry_after is not None:
            delay = max(delay, min(self._most, error.retry_after))
        if attempt >= LOUD_AFTER:
            said = f"waiting for {what}: {type(error).__name__}: {error}"
            log.warning("%s; attempt %d, again in %.1f s", said, attempt, delay)
            self._on_wait(said[:1000])
        try:
            await asyncio.wait_for(self._stopping.wait(), delay)
        except TimeoutError:
            return
        raise Stopping(f"told to stop while waiting for {what}: {error}")
