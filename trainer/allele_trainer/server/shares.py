"""Which work goes into the next micro-batch when several runs wait: fair queueing by tokens. Pure.

Work comes in units: some sequences of one member, small enough for one micro-batch, in an order that the member needs.
Units are taken one by one from the run that has had the fewest tokens so far; a run that comes anew starts level with
the one that has had least. So a run with much to do delays another by no more than its own part, however long its queue
is, and none is ever behind by more than a micro-batch and a unit that did not fit (P. Goyal, H. Vin and H. Cheng,
Start-time Fair Queueing, 1996).
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from allele.protocol.commands import Mode

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Unit(Generic[T]):
    """Of one member; two units of a member never share a micro-batch, because their gradients add up in order."""

    member: Hashable
    bank: Hashable
    """What bounds the members of a micro-batch: each bank takes so many."""
    tokens: int
    work: T


@dataclasses.dataclass
class _Queue(Generic[T]):
    units: collections.deque[Unit[T]]
    mode: Mode
    alone: bool
    had: int
    """Tokens, counted on from the run that had least when this one came."""

    @property
    def shared(self) -> bool:
        return self.mode == "Batched" and not self.alone


class Shares(Generic[T]):
    """Queues of units by run."""

    def __init__(self, *, max_tokens: int, max_members: int) -> None:
        """Of a micro-batch: its tokens, though one unit that is larger goes alone, and its members of each bank."""
        self._most, self._members = max_tokens, max_members
        self._queues: dict[str, _Queue[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, run: str, units: Iterable[Unit[T]], *, mode: Mode = "Batched", alone: bool = False) -> None:
        """`mode` OneByOne: each unit is a micro-batch; `alone`: never with units of another run."""
        least = min((q.had for q in self._queues.values()), default=0)
        self._queues[run] = _Queue(collections.deque(units), mode, alone, least)

    def remove(self, run: str) -> None:
        self._queues.pop(run, None)

    def next(self) -> list[tuple[str, Unit[T]]]:
        """The next micro-batch, or nothing when no run waits."""
        if not self._queues:
            return []
        first = min(self._queues, key=lambda r: self._queues[r].had)
        queue = self._queues[first]
        picked: _Picked[T] = _Picked(self._most, self._members)
        if queue.mode == "OneByOne":
            picked.take(first, queue)
        else:
            runs = [r for r, q in self._queues.items() if q.shared] if queue.shared else [first]
            picked.fill({r: self._queues[r] for r in runs})
        for run in dict.fromkeys(run for run, _ in picked.units):
            queue = self._queues.pop(run)  # to the end: of runs that are level the one that waits longest begins
            if queue.units:
                self._queues[run] = queue
        return picked.units


class _Picked(Generic[T]):
    """A micro-batch while it is put together."""

    def __init__(self, tokens: int, members: int) -> None:
        self.units: list[tuple[str, Unit[T]]] = []
        self._room, self._most = tokens, members
        self._members: set[Hashable] = set()
        self._of_bank: collections.Counter[Hashable] = collections.Counter()

    def fill(self, queues: Mapping[str, _Queue[T]]) -> None:
        """Take units, always of the run that has had least, until none of them has one that fits."""
        waiting = [(q.had, place, run) for place, (run, q) in enumerate(queues.items())]
        heapq.heapify(waiting)
        while waiting:
            _, place, run = waiting[0]
            queue = queues[run]
            if queue.units and self._fits(queue.units[0]):
                self.take(run, queue)
                heapq.heapreplace(waiting, (queue.had, place, run))
            else:
                heapq.heappop(waiting)

    def take(self, run: str, queue: _Queue[T]) -> None:
        unit = queue.units.popleft()
        self._room -= unit.tokens
        queue.had += unit.tokens
        self._members.add(unit.member)
        self._of_bank[unit.bank] += 1
        self.units.append((run, unit))

    def _fits(self, unit: Unit[T]) -> bool:
        if not self.units:
            return True
        full = self._of_bank[unit.bank] >= self._most
        return unit.tokens <= self._room and unit.member not in self._members and not full
