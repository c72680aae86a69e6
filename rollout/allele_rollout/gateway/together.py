"""What asks one at a time goes out together: everything that came while the last batch was under way is the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Together(Generic[T]):
    """Runs `work` on what is added, at most `at_once` batches at a time. `work` must not raise."""

    def __init__(self, work: Callable[[list[T]], Awaitable[None]], *, at_once: int = 1) -> None:
        self._work = work
        self._at_once = at_once
        self._waiting: dict[T, None] = {}
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, item: T) -> None:
        self._waiting[item] = None
        if self._running < self._at_once:
            self._running += 1
            task = asyncio.ensure_future(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        await asyncio.sleep(0)  # what is added in the same turn goes along
        while self._waiting:
            batch, self._waiting = list(self._waiting), {}
            await self._work(batch)
        self._running -= 1  # here and not when the task is done: what is added in between would find nobody
