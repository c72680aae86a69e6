"""The way to the engine: a bounded number may wait, adapters are loaded meanwhile, and the schedule says whose turn it
is.

Waiting requests hold their adapters in host memory, so that loading overlaps with what runs. A request that waits
longer than the deadline, or comes when too many wait, is told to come back: nothing is kept without end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from allele.protocol.errors import Overloaded
from allele.residency import Schedule
from allele_rollout.gateway.adapter import Adapter

Hold = Callable[[Adapter], AbstractAsyncContextManager[str]]


class Bound:
    """At most `limit` inside at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.inside = 0

    @asynccontextmanager
    async def place(self, count: int = 1) -> AsyncIterator[None]:
        """`count` places, all or none. Raises Overloaded when there are fewer."""
        if self.inside + count > self._limit:
            found = f"found {self.inside} and {count} more"
            raise Overloaded(f"queue: expected at most {self._limit} requests, {found}", retry_after=1.0)
        self.inside += count
        try:
            yield
        finally:
            self.inside -= count


class Turn:
    """One job of the schedule."""

    def __init__(self) -> None:
        self.come: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Dispatcher:
    """Turns at one engine."""

    def __init__(
        self,
        schedule: Schedule[Turn],
        *,
        hold: Hold,
        deadline: float,
        on_wait: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hold`: keeps an adapter loaded and gives its name; `deadline`: most seconds a turn may wait."""
        self._schedule = schedule
        self._hold = hold
        self._deadline = deadline
        self._on_wait = on_wait
        self._clock = clock

    @property
    def running(self) -> int:
        return self._schedule.running

    @property
    def waiting(self) -> int:
        return self._schedule.waiting

    @asynccontextmanager
    async def turn(self, adapter: Adapter | None, *, cost: int = 1) -> AsyncIterator[str | None]:
        """Inside, `cost` sequences of the adapter (None: the bare base) may run; its name in the engine.

        Raises Overloaded after the deadline, and what loading the adapter raised.
        """
        begun = self._clock()
        turn, mine = Turn(), False
        timeout = asyncio.timeout(self._deadline)
        held: AbstractAsyncContextManager[str | None] = nullcontext() if adapter is None else self._hold(adapter)
        member = None if adapter is None else adapter.member
        try:
            async with timeout, held as name:
                self._schedule.add(turn, adapter=name, member=member, cost=cost, now=begun)
                try:
                    self._pump()
                    await turn.come
                    timeout.reschedule(None)
                    mine = True
                    self._on_wait(self._clock() - begun)
                    yield name
                finally:
                    if not self._schedule.drop(turn):
                        self._schedule.done(turn)
                    self._pump()
        except TimeoutError as e:
            if mine:
                raise
            raise Overloaded(f"queue: no turn within {self._deadline:g} s", retry_after=5.0) from e

    def _pump(self) -> None:
        for turn in self._schedule.take(self._clock()):
            if not turn.come.done():  # else its caller has just gone, and gives the turn back
                turn.come.set_result(None)
