"""Which waiting requests go to the engine. Pure policy: times are arguments, requests are opaque.

An engine batch holds at most `slots` distinct adapters, and one that interleaves more swaps adapters at every step, at
four to five times the cost. So requests go out grouped by adapter, and while more adapters want to run than there are
slots, each keeps its slot for a quantum of work and then gives it on.

    add ─► account (per member) ─► turn in this round ─► take ─► running ─► done
                    ▲                      │ quantum used up
                    └──── next round ◄─────┘

Fairness is deficit round robin over members (Shreedhar and Varghese, 1995): in each round a member may start a quantum
of cost, what was too little for its next job is kept, and a round ends when all who wait had their turn. A member that
had its turn waits for the others, so that its adapters drain and their slots come free; who holds a slot when a round
ends has its next turn at once, so a slot changes hands after one or two quanta. The revisions of a member share its
account. Jobs of the bare base need no slot and have an account of their own, so they never wait for one.

Two things bend that order. A job older than `patience` goes first, whatever its member has had. And while everybody
whose turn it is waits for a slot, jobs of the base take the room that is left.

What can go wrong: a quantum of the cost of one job makes slots change hands all the time; one that is very large makes
those without a slot wait until patience ends it. When everything is older than patience, age alone decides.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

J = TypeVar("J", bound=Hashable)


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting(Generic[J]):
    job: J
    account: _Account[J]
    adapter: Hashable | None
    cost: int
    since: float
    number: int
    """Of its arrival."""


@dataclasses.dataclass(slots=True, eq=False)
class _Account(Generic[J]):
    """A member's waiting jobs and what it may still start."""

    key: tuple[Hashable, bool]
    deficit: int
    round: int
    """Newest round that `deficit` has a quantum of."""
    lanes: dict[Hashable | None, OrderedDict[J, _Waiting[J]]] = dataclasses.field(default_factory=dict)
    lane: Hashable | None = None
    """Adapter that this turn is for."""
    running: int = 0

    def head(self) -> _Waiting[J]:
        """Its next job: of the adapter that its turn is for, otherwise its oldest."""
        if self.lane not in self.lanes:
            self.lane = min(self.lanes, key=lambda adapter: _first(self.lanes[adapter]).number)
        return _first(self.lanes[self.lane])


def _first(lane: OrderedDict[J, _Waiting[J]]) -> _Waiting[J]:
    return next(iter(lane.values()))


class Schedule(Generic[J]):
    """Starting a job takes time proportional to `slots`, plus the waiting members whose next job is too large."""

    def __init__(self, *, slots: int, running: int, quantum: int, patience: float) -> None:
        """`slots`: distinct adapters at once; `running`: cost at once; `quantum`: cost a turn; `patience`: seconds."""
        if min(slots, running, quantum) < 1 or patience < 0:
            raise ValueError(
                "Schedule: expected slots, running and quantum of at least 1 and patience of at least 0, found "
                f"{slots}, {running}, {quantum} and {patience}"
            )
        self._slots = slots
        self._limit = running
        self._quantum = quantum
        self._patience = patience
        self._round = 0
        self._accounts: dict[tuple[Hashable, bool], _Account[J]] = {}
        self._turn: OrderedDict[_Account[J], None] = OrderedDict()
        """Who waits and has not had its turn in this round, in order."""
        self._later: OrderedDict[_Account[J], None] = OrderedDict()
        """Who waits for the next round."""
        self._waiting: dict[J, _Waiting[J]] = {}
        self._by_age: list[tuple[float, int, _Waiting[J]]] = []
        """A heap; what has started or was dropped is left out when it comes up."""
        self._wanted: dict[Hashable | None, dict[_Account[J], None]] = {}
        """By adapter, whose jobs wait for it."""
        self._running: dict[J, _Waiting[J]] = {}
        self._active: dict[Hashable, int] = {}
        self._cost = 0
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that run."""
        return len(self._running)

    @property
    def active(self) -> frozenset[Hashable]:
        """Adapters that hold a slot: those with a running job."""
        return frozenset(self._active)

    def add(self, job: J, *, adapter: Hashable | None, member: Hashable, cost: int, now: float) -> None:
        """`job` waits, and has waited since `now`, which may lie back. `adapter` None: the bare base, no slot.

        Raises ValueError for one that waits or runs already.
        """
        if job in self._waiting or job in self._running:
            raise ValueError(f"add {job!r}: expected a new job, found one that waits or runs")
        if cost < 1:
            raise ValueError(f"add {job!r}: expected a cost of at least 1, found {cost}")
        key = (member, adapter is None)
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(key, self._quantum, self._round + 1)
        if not account.lanes:
            self._line_up(account)
        waiting = _Waiting(job, account, adapter, cost, now, next(self._numbers))
        self._waiting[job] = waiting
        heapq.heappush(self._by_age, (now, waiting.number, waiting))
        account.lanes.setdefault(adapter, OrderedDict())[job] = waiting
        self._wanted.setdefault(adapter, {})[account] = None

    def take(self, now: float) -> list[J]:
        """What may start now, in the order to send, jobs of one adapter together. They count as running."""
        taken: dict[Hashable | None, list[J]] = {}
        while (found := self._next(now)) is not None:
            self._start(found)
            taken.setdefault(found.adapter, []).append(found.job)
        return [job for jobs in taken.values() for job in jobs]

    def done(self, job: J) -> None:
        """It ended, however. Raises ValueError when it does not run: the caller's books are wrong."""
        ended = self._running.pop(job, None)
        if ended is None:
            found = "one that waits" if job in self._waiting else "no such job"
            raise ValueError(f"done {job!r}: expected a running job, found {found}")
        self._cost -= ended.cost
        if ended.adapter is not None:
            self._active[ended.adapter] -= 1
            if not self._active[ended.adapter]:
                del self._active[ended.adapter]
        ended.account.running -= 1
        self._close(ended.account)

    def drop(self, job: J) -> bool:
        """Forget a job that waits; False when it does not."""
        waiting = self._waiting.get(job)
        if waiting is None:
            return False
        self._leave(waiting)
        self._close(waiting.account)
        return True

    def _next(self, now: float) -> _Waiting[J] | None:
        if not self._waiting or (self._running and self._cost >= self._limit):
            return None
        oldest = self._oldest()
        if now - oldest.since > self._patience:
            self._bring_forward(oldest)
            if self._has_slot(oldest.adapter):  # then it wants only room: nothing else may take that
                return oldest if self._fits(oldest) else None
            # One slot is enough. What runs least takes nothing more, so that least only falls, and a slot comes free.
            return self._by_turn(closed=min(self._active, key=self._active.__getitem__))
        return self._by_turn()

    def _oldest(self) -> _Waiting[J]:
        while self._waiting.get(self._by_age[0][2].job) is not self._by_age[0][2]:
            heapq.heappop(self._by_age)
        return self._by_age[0][2]

    def _by_turn(self, *, closed: Hashable | None = None) -> _Waiting[J] | None:
        """The next by round robin; not of the adapter that is `closed`."""
        while True:
            if not self._turn:
                if not self._later:
                    return None
                self._turn, self._later = self._later, self._turn
                self._round += 1
            able = self._turn if len(self._active) < self._slots else self._holders(closed)
            account = next((a for a in able if self._fits(a.head())), None)
            if account is None:
                return None if able else self._base_out_of_turn()
            head = account.head()
            if head.cost <= account.deficit:
                return head
            self._end_turn(account)

    def _holders(self, closed: Hashable | None) -> list[_Account[J]]:
        """Who can go on although no slot is free, oldest job first: its adapter has one, or it needs none."""
        found = [
            account
            for adapter in (None, *(a for a in self._active if a != closed))
            for account in self._wanted.get(adapter, ())
            if account in self._turn and account.head().adapter == adapter
        ]
        return sorted(found, key=lambda account: account.head().number)

    def _base_out_of_turn(self) -> _Waiting[J] | None:
        """All whose turn it is wait for slots; the base needs none. Its accounts share the room by their own turns."""
        while fitting := [a for a in self._wanted.get(None, ()) if self._fits(a.head())]:
            for account in fitting:
                if account.head().cost <= account.deficit:
                    return account.head()
            for account in fitting:
                account.deficit += self._quantum
        return None

    def _line_up(self, account: _Account[J]) -> None:
        """It waits again: in this round if it has begun its turn there, otherwise behind those who wait."""
        if account.round < self._round:
            account.deficit = self._quantum
            account.round = self._round + 1
        (self._turn if account.round == self._round else self._later)[account] = None

    def _end_turn(self, account: _Account[J]) -> None:
        del self._turn[account]
        self._later[account] = None
        account.lane = None
        if account.round == self._round:
            account.round += 1
            account.deficit += self._quantum
        # Otherwise it was brought forward and has used the quantum of the next round already.

    def _bring_forward(self, waiting: _Waiting[J]) -> None:
        account = waiting.account
        account.lane = waiting.adapter
        self._later.pop(account, None)
        self._turn[account] = None
        self._turn.move_to_end(account, last=False)

    def _has_slot(self, adapter: Hashable | None) -> bool:
        return adapter is None or adapter in self._active or len(self._active) < self._slots

    def _fits(self, waiting: _Waiting[J]) -> bool:
        return not self._running or self._cost + waiting.cost <= self._limit

    def _start(self, waiting: _Waiting[J]) -> None:
        self._leave(waiting)
        self._running[waiting.job] = waiting
        self._cost += waiting.cost
        if waiting.adapter is not None:
            self._active[waiting.adapter] = self._active.get(waiting.adapter, 0) + 1
        waiting.account.running += 1
        waiting.account.deficit -= waiting.cost

    def _leave(self, waiting: _Waiting[J]) -> None:
        account, adapter = waiting.account, waiting.adapter
        del self._waiting[waiting.job]
        del account.lanes[adapter][waiting.job]
        if account.lanes[adapter]:
            return
        del account.lanes[adapter], self._wanted[adapter][account]
        if not self._wanted[adapter]:
            del self._wanted[adapter]
        if not account.lanes:
            self._turn.pop(account, None)
            self._later.pop(account, None)

    def _close(self, account: _Account[J]) -> None:
        if not account.running and not account.lanes:
            del self._accounts[account.key]
