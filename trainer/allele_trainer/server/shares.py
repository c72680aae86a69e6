"""Which work goes into the next micro-batch when several runs wait: deficit round robin by tokens. Pure.

Work comes in units: some sequences of one member, small enough for one micro-batch, in an order that the member needs.
Each micro-batch owes every waiting run an equal part of its tokens; what a run cannot use now it may use later (its
deficit), and what is left over is given away. So a run with much to do delays another by no more than its own part,
however long its queue is (M. Shreedhar and G. Varghese, Efficient Fair Queuing Using Deficit Round Robin, 1995).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable
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
    deficit: float = 0.0


class Shares(Generic[T]):
    """Queues of units by run."""

    def __init__(self, *, max_tokens: int, max_members: int) -> None:
        """Of a micro-batch: its tokens, though one unit that is larger goes alone, and its members of each bank."""
        self._most, self._members = max_tokens, max_members
        self._queues: collections.OrderedDict[str, _Queue[T]] = collections.OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, run: str, units: Iterable[Unit[T]], *, mode: Mode = "Batched", alone: bool = False) -> None:
        """`mode` OneByOne: each unit is a micro-batch; `alone`: never with units of another run."""
        self._queues[run] = _Queue(collections.deque(units), mode, alone)

    def remove(self, run: str) -> None:
        self._queues.pop(run, None)

    def next(self) -> list[tuple[str, Unit[T]]]:
        """The next micro-batch, or nothing when no run waits."""
        if not self._queues:
            return []
        first = self._first()
        queue = self._queues[first]
        picked: _Picked[T] = _Picked(self._most, self._members)
        if queue.mode == "OneByOne":
            picked.take(first, queue)
        elif queue.alone:
            picked.fill(first, queue, limit=None)
        else:
            shared = [(r, q) for r, q in self._queues.items() if q.mode == "Batched" and not q.alone]
            shared.sort(key=lambda item: item[0] != first)
            for run, other in shared:
                picked.fill(run, other, limit=other.deficit)
            for run, other in shared:
                picked.fill(run, other, limit=None)
        for run in [r for r, q in self._queues.items() if not q.units]:
            del self._queues[run]
        return picked.units

    def _first(self) -> str:
        """Give every run its part, and choose who may begin: the run with the most due, in turn among equals."""
        part = self._most / len(self._queues)
        for queue in self._queues.values():
            queue.deficit = min(queue.deficit + part, float(max(self._most, queue.units[0].tokens)))
        first = max(self._queues, key=lambda r: self._queues[r].deficit)
        self._queues.move_to_end(first)
        return first


class _Picked(Generic[T]):
    """A micro-batch while it is put together."""

    def __init__(self, tokens: int, members: int) -> None:
        self.units: list[tuple[str, Unit[T]]] = []
        self._room, self._most = tokens, members
        self._members: set[Hashable] = set()
        self._of_bank: collections.Counter[Hashable] = collections.Counter()

    def fill(self, run: str, queue: _Queue[T], *, limit: float | None) -> None:
        """Take units in order while there is room, and while the run's deficit lasts if `limit` says so."""
        while queue.units:
            unit = queue.units[0]
            if self.units:
                within = unit.tokens <= self._room and (limit is None or unit.tokens <= queue.deficit)
                full = self._of_bank[unit.bank] >= self._most
                if full or not within or unit.member in self._members:
                    return
            self.take(run, queue)

    def take(self, run: str, queue: _Queue[T]) -> None:
        unit = queue.units.popleft()
        self._room -= unit.tokens
        queue.deficit -= unit.tokens
        self._members.add(unit.member)
        self._of_bank[unit.bank] += 1
        self.units.append((run, unit))
