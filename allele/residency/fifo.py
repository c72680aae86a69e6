"""First come first served: what an engine does with requests on its own, for the simulator to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

J = TypeVar("J", bound=Hashable)


class Queue(Protocol[J]):
    """What it has in common with Schedule."""

    def add(self, job: J, *, adapter: Hashable | None, member: Hashable, cost: int, now: float) -> None: ...

    def take(self, now: float) -> list[J]: ...

    def done(self, job: J) -> None: ...

    @property
    def waiting(self) -> int: ...


class Fifo(Generic[J]):
    """In order of arrival, over whom no slot is free for. All jobs count alike."""

    def __init__(self, *, slots: int, running: int) -> None:
        self._slots, self._limit = slots, running
        self._queue: dict[J, Hashable | None] = {}
        self._running: dict[J, Hashable | None] = {}
        self._active: Counter[Hashable | None] = Counter()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, job: J, *, adapter: Hashable | None, member: Hashable, cost: int, now: float) -> None:
        self._queue[job] = adapter

    def take(self, now: float) -> list[J]:
        taken: list[J] = []
        for job, adapter in self._queue.items():
            if len(self._running) == self._limit:
                break
            if adapter in self._active or len(self._active) < self._slots:
                self._active[adapter] += 1
                self._running[job] = adapter
                taken.append(job)
        for job in taken:
            del self._queue[job]
        return taken

    def done(self, job: J) -> None:
        adapter = self._running.pop(job)
        self._active[adapter] -= 1
        if not self._active[adapter]:
            del self._active[adapter]
