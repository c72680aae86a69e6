"""What a traffic would meet: a discrete-event model of one replica around the policies that serve it.

    request ─► warm? ── yes ──────────────────────────► schedule ─► engine steps ─► first token
                 └─ no ─► read (disk, S3) ─► register ────┘           (slot fill, prefill, decode)

`Tier` and `Schedule` are the ones of production; what is modelled is time. The engine is one thing at a time: while it
registers an adapter nobody gets a token. Three ways to deal with that are compared:

  off        a request for a cold adapter loads it at once, a call each, as many as come; requests run first come first
             served
  admission  at most `loads` are read at once, a call a step registers what is there, and calls take at most `share` of
             the engine's time; requests run by Schedule; who would be the one too many is refused (429)
  two-phase  as admission, and a new revision is exposed when it is loaded; until then the old one answers

What can mislead: steps cost the same whatever the length of the context, and one replica is alone.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence

from allele.residency.fifo import Fifo, Queue
from allele.residency.replica import BULK, Costs, Setup
from allele.residency.schedule import Schedule
from allele.residency.tier import Tier, TierFull
from allele.residency.traces import Event, Publish, Request

Adapter = tuple[str, int]
"""Member and revision."""


class Mode(enum.StrEnum):
    off = "off"
    admission = "admission"
    two_phase = "two-phase"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Shares are of all requests, by where the adapter was when each came; seconds are to the first token."""

    policy: str
    requests: int
    hot: float
    warm: float
    disk: float
    cold: float
    warm_p50: float | None
    warm_p95: float | None
    cold_p50: float | None
    cold_p95: float | None
    p95: float | None
    """Of all."""
    refused: int
    stalls: int
    """Warm requests whose first token took longer than `Setup.stall`."""
    loads: int


def simulate(events: Sequence[Event], mode: Mode, *, setup: Setup | None = None, costs: Costs = BULK) -> Outcome:
    """Run all events to the end of the last answer. The same input gives the same outcome."""
    return _Replica(mode, setup or Setup(), costs).run(events)


@dataclasses.dataclass(eq=False, slots=True)
class _Job:
    adapter: Adapter
    came: float
    source: str
    left: int
    """Tokens to come."""
    first: float | None = None


class _Replica:
    def __init__(self, mode: Mode, setup: Setup, costs: Costs) -> None:
        self._mode, self._setup, self._costs = mode, setup, costs
        self._hot: Tier[Adapter] = Tier(places=setup.slots)
        self._warm: Tier[Adapter] = Tier(places=setup.warm)
        self._disk: Tier[Adapter] = Tier(places=setup.disk)
        if mode is Mode.off:
            self._queue: Queue[_Job] = Fifo[_Job](slots=setup.slots, running=setup.running)
        else:
            self._queue = Schedule[_Job](
                slots=setup.slots, running=setup.running, quantum=setup.quantum, patience=setup.patience
            )
        self._served: Counter[str] = Counter()
        self._newest: Counter[str] = Counter()
        self._flights: dict[Adapter, list[_Job]] = {}
        """Being read or registered, and who waits for each."""
        self._to_read: deque[Adapter] = deque()
        self._to_prewarm: deque[Adapter] = deque()
        self._read: deque[Adapter] = deque()
        """Read, not yet registered."""
        self._reading = 0
        self._unloads = 0
        self._running: list[_Job] = []
        self._jobs: list[_Job] = []
        self._loads = 0
        self._stepping = False
        self._now = self._next_call = self._next_ahead = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def run(self, events: Sequence[Event]) -> Outcome:
        for event in events:
            handler = self._publish if isinstance(event, Publish) else self._request
            self._at(event.time, lambda event=event, handler=handler: handler(event))  # type: ignore[misc]
        while self._agenda:
            self._now, _, happen = heapq.heappop(self._agenda)
            happen()
            if not self._stepping:
                self._begin_step()
        return self._outcome()

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time, next(self._numbers), happen))

    def _publish(self, event: Publish) -> None:
        for member in event.members:
            self._newest[member] += 1
            old, new = (member, self._served[member]), (member, self._newest[member])
            if self._mode is Mode.two_phase and old in self._warm:
                self._to_prewarm.append(new)
            else:
                self._expose(new)
        self._begin_reads()

    def _expose(self, adapter: Adapter) -> None:
        old = (adapter[0], self._served[adapter[0]])
        self._served[adapter[0]] = adapter[1]
        if self._mode is not Mode.off:
            for tier in (self._hot, self._warm, self._disk):
                tier.supersede(old, by=adapter)

    def _request(self, event: Request) -> None:
        adapter = (event.member, self._served[event.member])
        job = _Job(adapter, self._now, self._source(adapter), self._setup.output)
        self._jobs.append(job)
        waiting = self._queue.waiting + sum(map(len, self._flights.values()))
        if self._mode is not Mode.off and waiting >= self._setup.waiting:
            return
        if adapter in self._flights:
            self._warm.pin(adapter)
            self._flights[adapter].append(job)
        elif self._warm.pin(adapter):
            self._enqueue(job)
        elif self._load(adapter):
            self._flights[adapter].append(job)
            self._to_read.append(adapter)
            self._begin_reads()

    def _source(self, adapter: Adapter) -> str:
        if adapter in self._flights:
            return "cold"
        named = {"hot": self._hot, "warm": self._warm, "disk": self._disk}
        return next((name for name, tier in named.items() if adapter in tier), "cold")

    def _enqueue(self, job: _Job) -> None:
        self._queue.add(job, adapter=job.adapter, member=job.adapter[0], cost=1, now=job.came)

    def _load(self, adapter: Adapter) -> bool:
        """Make room for it; False when all that is warm is in use."""
        try:
            evicted = self._warm.admit(adapter, pin=True)
        except TierFull:
            return False
        for old in evicted:
            self._unloads += 1
            self._hot.remove(old)
        self._flights[adapter] = []
        return True

    def _begin_reads(self) -> None:
        """What requests wait for comes before what is loaded ahead of them."""
        while self._mode is Mode.off or self._reading < self._setup.loads:
            if self._to_read:
                adapter = self._to_read.popleft()
            elif self._to_prewarm and len(self._flights) < self._setup.loads:
                adapter = self._to_prewarm.popleft()
                if not self._load(adapter):
                    self._expose(adapter)
                    continue
            else:
                return
            self._reading += 1
            on_disk = adapter in self._disk
            self._disk.admit(adapter)
            seconds = self._costs.disk_read if on_disk else self._costs.cold_read
            self._at(self._now + seconds, lambda adapter=adapter: self._end_read(adapter))  # type: ignore[misc]

    def _end_read(self, adapter: Adapter) -> None:
        self._reading -= 1
        self._read.append(adapter)
        self._begin_reads()

    def _register(self) -> float:
        """Register what was read and return the seconds that it takes: all, a call each, or one call."""
        if self._mode is Mode.off:
            batch, self._read = list(self._read), deque()
            calls = len(batch)
        else:
            batch = self._batch()
            calls = min(1, len(batch))
        seconds = calls * self._costs.call + len(batch) * self._costs.register + self._unloads * self._costs.unload
        self._unloads = 0
        self._loads += len(batch)
        if batch:
            self._next_call = self._now + seconds / self._setup.share
            self._next_ahead = self._now + 2.0 * seconds / self._setup.share
        for adapter in batch:
            for job in self._flights[adapter]:
                self._enqueue(job)
            if not self._flights.pop(adapter):
                self._expose(adapter)
                self._warm.unpin(adapter)
        self._begin_reads()
        return seconds

    def _batch(self) -> list[Adapter]:
        """What the next call registers: what requests wait for, then what is loaded ahead."""
        batch = []
        for due, ahead in ((self._next_call, False), (self._next_ahead, True)):
            if self._now >= due or not self._running:  # while nothing runs there is no one to spare
                batch += [adapter for adapter in self._read if (not self._flights[adapter]) == ahead]
        del batch[self._costs.batch :]
        for adapter in batch:
            self._read.remove(adapter)
        return batch

    def _begin_step(self) -> None:
        """Register, fill slots, prefill those that start, and decode a token of each."""
        seconds = self._register()
        started = self._queue.take(self._now)
        for job in started:
            if not self._hot.pin(job.adapter):
                self._hot.admit(job.adapter, pin=True)
                seconds += self._costs.fill
        self._running += started
        if not self._running and not seconds:
            return
        seconds += len(started) * self._setup.prompt * self._costs.prefill
        if self._running:
            changes = sum(a.adapter != b.adapter for a, b in itertools.pairwise(self._running))
            mixed = changes / max(1, len(self._running) - 1)
            seconds += self._costs.step * (1.0 + (self._costs.interleaved - 1.0) * mixed)
        self._stepping = True
        self._at(self._now + seconds, self._end_step)

    def _end_step(self) -> None:
        self._stepping = False
        for job in self._running:
            job.first = self._now if job.first is None else job.first
            job.left -= 1
            if not job.left:
                self._queue.done(job)
                self._hot.unpin(job.adapter)
                self._warm.unpin(job.adapter)
        self._running = [job for job in self._running if job.left]

    def _outcome(self) -> Outcome:
        jobs = [job for job in self._jobs if job.came >= self._setup.settle]
        shares = Counter(job.source for job in jobs)
        taken = {
            warm: sorted(j.first - j.came for j in jobs if j.first is not None and (j.source in _WARM) == warm)
            for warm in (True, False)
        }
        total = max(1, len(jobs))
        return Outcome(
            policy=str(self._mode),
            requests=len(jobs),
            hot=shares["hot"] / total,
            warm=shares["warm"] / total,
            disk=shares["disk"] / total,
            cold=shares["cold"] / total,
            warm_p50=_quantile(taken[True], 0.5),
            warm_p95=_quantile(taken[True], 0.95),
            cold_p50=_quantile(taken[False], 0.5),
            cold_p95=_quantile(taken[False], 0.95),
            p95=_quantile(sorted(taken[True] + taken[False]), 0.95),
            refused=sum(job.first is None for job in jobs),
            stalls=sum(seconds > self._setup.stall for seconds in taken[True]),
            loads=self._loads,
        )


_WARM = frozenset({"hot", "warm"})


def _quantile(values: Sequence[float], share: float) -> float | None:
    """Of sorted values; None of none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None
