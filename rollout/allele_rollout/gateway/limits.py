"""Bounded queue in front of the engine: what does not fit is told to come back, never kept without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from allele.protocol.errors import Overloaded


class Queue:
    """At most `running` at once and `waiting` behind them, each for at most `deadline` seconds."""

    def __init__(self, *, running: int, waiting: int, deadline: float) -> None:
        self._limit = running + waiting
        self._deadline = deadline
        self._places = asyncio.Semaphore(running)
        self.inside = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Raises Overloaded when the queue is full or the wait too long."""
        if self.inside >= self._limit:
            raise Overloaded(f"queue: expected fewer than {self._limit} requests, found {self.inside}", retry_after=1.0)
        self.inside += 1
        try:
            try:
                await asyncio.wait_for(self._places.acquire(), self._deadline)
            except TimeoutError as e:
                raise Overloaded(f"queue: no place within {self._deadline:g} s", retry_after=5.0) from e
            try:
                yield
            finally:
                self._places.release()
        finally:
            self.inside -= 1
