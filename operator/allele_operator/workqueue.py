"""Keyed work queue: each key is worked on by one worker at a time, and a failing key waits without holding up others.

Adding a key that waits changes nothing; adding one that is being worked on makes it run once more. A failure is
repeated after an exponential delay with jitter, or later when the server said so. One timer per key: the earlier wins.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from allele_operator.cluster.errors import ApiError, FenceShut

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Keys to work on. `backoff` and `longest` are the first and the largest delay after a failure, in seconds."""

    def __init__(
        self,
        *,
        backoff: float,
        longest: float,
        jitter: Callable[[float, float], float] = random.uniform,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backoff = backoff
        self._longest = longest
        self._jitter = jitter
        self._clock = clock
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: dict[K, float] = {}
        self._running: dict[K, float] = {}
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}

    def add(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = self._clock()
            self._ready.put_nowait(key)

    def add_later(self, key: K, *, seconds: float) -> None:
        """Adds the key after a while, unless it is added, or wished for earlier, before that."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(due, self.add, key)

    def failures(self, key: K) -> int:
        return self._failures.get(key, 0)

    @property
    def depth(self) -> int:
        """Keys that wait for a worker now."""
        return len(self._waiting)

    @property
    def failing(self) -> int:
        return len(self._failures)

    @property
    def oldest(self) -> float:
        """Seconds that the longest waiting or longest running key has been at it."""
        since = [*self._waiting.values(), *self._running.values()]
        return self._clock() - min(since) if since else 0.0

    async def work(self, handle: Callable[[K], Awaitable[None]]) -> None:
        """One worker, for ever. Only FenceShut ends it: everything else is a failure of its key."""
        while True:
            key = await self._ready.get()
            self._waiting.pop(key, None)
            self._running[key] = self._clock()
            try:
                await handle(key)
                self._failures.pop(key, None)
            except FenceShut:
                raise
            except Exception as e:
                self._fail(key, e)
            finally:
                del self._running[key]
                if key in self._again:
                    self._again.discard(key)
                    self._readd(key)

    def _readd(self, key: K) -> None:
        """A key that changed while it failed still waits out its delay: a hot object must not skip the backoff."""
        if key not in self._timers:
            self.add(key)

    def _fail(self, key: K, error: Exception) -> None:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(self._longest, self._backoff * 2.0 ** min(count - 1, 30)) * self._jitter(0.5, 1.0)
        if isinstance(error, ApiError):
            delay = max(delay, error.retry_after)
            # the first conflict is everyday life: the object changed while we decided
            level = logging.DEBUG if error.conflict and count == 1 else logging.WARNING
            log.log(level, "%s: %s; again in %.1f s", key, error, delay)
        else:
            log.exception("%s: again in %.1f s", key, delay, exc_info=error)
        self.add_later(key, seconds=delay)
