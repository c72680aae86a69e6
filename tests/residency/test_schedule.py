"""The schedule keeps within slots and room, loses nothing, shares fairly, and lets nobody starve."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.residency import Schedule


@dataclasses.dataclass(frozen=True)
class Job:
    number: int
    adapter: str | None
    member: str
    cost: int
    since: float = 0.0


class Engine:
    """Drives a schedule and checks after every step what must always hold."""

    def __init__(self, *, slots: int, running: int, quantum: int, patience: float = math.inf) -> None:
        self.schedule: Schedule[Job] = Schedule(slots=slots, running=running, quantum=quantum, patience=patience)
        self.slots, self.limit, self.patience = slots, running, patience
        self.waiting: dict[Job, None] = {}
        self.running: dict[Job, None] = {}
        self.started: Counter[str] = Counter()
        self.numbers = 0

    def add(self, adapter: str | None, member: str, cost: int = 1, *, now: float = 0.0) -> Job:
        job = Job(self.numbers, adapter, member, cost, now)
        self.numbers += 1
        self.schedule.add(job, adapter=adapter, member=member, cost=cost, now=now)
        self.waiting[job] = None
        return job

    def take(self, now: float = 0.0) -> list[Job]:
        taken = self.schedule.take(now)
        for job in taken:
            del self.waiting[job]  # raises for one that was lost or comes twice
            self.running[job] = None
            self.started[job.member] += job.cost
        adapters = [job.adapter for job in taken]
        changes = sum(a != b for a, b in itertools.pairwise(adapters))
        assert changes == max(0, len(set(adapters)) - 1), f"not grouped: {adapters}"
        self.check(now)
        return taken

    def done(self, job: Job) -> None:
        del self.running[job]
        self.schedule.done(job)

    def drop(self, job: Job) -> None:
        assert self.schedule.drop(job)
        del self.waiting[job]

    @property
    def room(self) -> int:
        return self.limit - sum(j.cost for j in self.running)

    @property
    def active(self) -> set[str]:
        return {j.adapter for j in self.running if j.adapter is not None}

    def has_slot(self, job: Job) -> bool:
        return job.adapter is None or job.adapter in self.active or len(self.active) < self.slots

    def check(self, now: float) -> None:
        assert self.schedule.active == self.active
        assert (self.schedule.waiting, self.schedule.running) == (len(self.waiting), len(self.running))
        assert len(self.active) <= self.slots
        assert self.room >= 0 or len(self.running) == 1
        assert self.running or not self.waiting
        self.check_nothing_is_held_in_vain(now)

    def check_nothing_is_held_in_vain(self, now: float) -> None:
        """What could run and does not gives way to another: one that waits for room, or, if it has a slot, for one."""
        if not self.waiting or any(not self.running or j.cost > self.room for j in self.waiting):
            return
        able = [j for j in self.waiting if self.has_slot(j)]
        assert not any(j.adapter is None for j in able), "a job of the base has room and needs no slot"
        assert not able or len(self.active) == self.slots, f"slots and room are free, yet these wait: {able}"
        assert not able or len(able) < len(self.waiting), "all have slots and room is free, yet they wait"
        oldest = min(self.waiting, key=lambda j: j.since)
        assert oldest not in able or now - oldest.since <= self.patience, "the oldest waits although it could run"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 7), st.integers(1, 6)),
        st.tuples(st.sampled_from(["take", "take", "done", "drop", "later"]), st.integers(0, 99), st.just(0)),
    ),
    max_size=150,
)


@settings(max_examples=500, deadline=None)
@given(
    steps=STEPS,
    slots=st.integers(1, 4),
    running=st.integers(1, 12),
    quantum=st.integers(1, 8),
    patience=st.sampled_from([0.0, 3.0, math.inf]),
    most=st.sampled_from([1, 6]),
)
def test_bounds_and_books_hold_whatever_happens(
    steps: list[tuple[str, int, int]], slots: int, running: int, quantum: int, patience: float, most: int
) -> None:
    engine = Engine(slots=slots, running=running, quantum=quantum, patience=patience)
    now = 0.0
    for action, number, cost in steps:
        now += 1.0
        if action == "add":
            adapter = None if number == 0 else f"m{number // 2}@{number % 2}"
            engine.add(adapter, f"m{number // 2}", min(cost, most), now=now - cost)
        elif action == "take":
            engine.take(now)
        elif action == "later":
            now += 5.0
        elif jobs := list(engine.running if action == "done" else engine.waiting):
            (engine.done if action == "done" else engine.drop)(jobs[number % len(jobs)])
    while engine.waiting or engine.running:
        engine.take(now)
        engine.done(next(iter(engine.running)))
    assert engine.schedule.active == frozenset()
    assert not engine.schedule._accounts


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 5),
    quantum=st.integers(1, 16),
    running=st.sampled_from([4, 16, 64]),
)
def test_members_that_always_wait_get_equal_shares(seed: int, slots: int, quantum: int, running: int) -> None:
    """Whatever the number of their revisions and the size of their jobs."""
    rng = random.Random(seed)
    engine = Engine(slots=slots, running=running, quantum=quantum)
    revisions = {f"m{i}": rng.randint(1, 4) for i in range(6)}
    largest = {m: rng.randint(1, 4) for m in revisions}

    def add(member: str) -> None:
        engine.add(f"{member}@{rng.randrange(revisions[member])}", member, rng.randint(1, largest[member]))

    for member in revisions:
        for _ in range(30):
            add(member)
    for _ in range(300):
        for job in engine.take():
            add(job.member)
        shares = [engine.started[m] for m in revisions]
        assert max(shares) - min(shares) <= quantum + 2 * max(largest.values())
        engine.done(rng.choice(list(engine.running)))


def test_all_goes_at_once_while_there_are_slots_for_all() -> None:
    engine = Engine(slots=3, running=1000, quantum=2)
    jobs = [engine.add(adapter, f"m{adapter}") for adapter in ("a", "b", None, "c", "a", "c") * 20]
    assert set(engine.take()) == set(jobs)


def test_an_adapter_with_its_turn_used_up_drains_and_gives_its_slot_on() -> None:
    engine = Engine(slots=1, running=100, quantum=4)
    for adapter in "ab":
        for _ in range(10):
            engine.add(adapter, adapter)
    sent = []
    while engine.waiting:
        sent.append("".join(j.adapter or "" for j in engine.take()))
        for job in list(engine.running):
            engine.done(job)
    # Who has the slot when a round ends has its turn of the next one first: a change of hands less.
    assert sent == ["aaaa", "bbbbbbbb", "aaaaaa", "bb"]


def test_alone_it_goes_on_and_a_newcomer_waits_for_one_turn_only() -> None:
    engine = Engine(slots=1, running=8, quantum=4)
    for _ in range(40):
        engine.add("a", "a")
    running = engine.take()
    assert len(running) == 8
    late = engine.add("b", "b")
    for ended in range(8 + 4):  # what runs, and at most one more turn of a
        assert late in engine.waiting
        engine.done(next(iter(engine.running)))
        if late in engine.take():
            break
        assert ended < 8 + 4 - 1
    assert late in engine.running


def test_revisions_of_a_member_share_its_part() -> None:
    engine = Engine(slots=8, running=2, quantum=1)
    for i in range(300):
        engine.add(f"many@{i % 5}", "many")
        engine.add("one@1", "one")
    for _ in range(200):
        engine.take()
        engine.done(next(iter(engine.running)))
    assert abs(engine.started["many"] - engine.started["one"]) <= 2


def test_the_base_needs_no_slot() -> None:
    engine = Engine(slots=1, running=8, quantum=1)
    engine.add("a", "a")
    engine.take()
    engine.add("b", "b")
    base = [engine.add(None, "b") for _ in range(5)]
    assert set(engine.take()) == set(base)


def test_a_job_larger_than_the_engine_runs_alone() -> None:
    engine = Engine(slots=4, running=8, quantum=2)
    small = [engine.add("a", "a") for _ in range(30)]
    large = engine.add("b", "b", 50)
    while large not in engine.running:
        engine.take()
        if large not in engine.running:
            engine.done(next(iter(engine.running)))
    assert list(engine.running) == [large]
    engine.done(large)
    assert set(engine.take()) <= set(small)


def test_equals_go_oldest_first() -> None:
    engine = Engine(slots=1, running=1, quantum=1)
    jobs = [engine.add(name, name) for name in "dbca"]
    order = []
    for _ in jobs:
        [job] = engine.take()
        order.append(job)
        engine.done(job)
    assert order == jobs


@pytest.mark.parametrize("patience", [5.0, math.inf])
def test_a_job_older_than_patience_goes_before_the_round_robin(patience: float) -> None:
    """A member with a long queue and many others behind it: its second job would wait for a whole round."""
    engine = Engine(slots=1, running=1, quantum=1, patience=patience)
    engine.add("first", "first", now=0.0)
    second = engine.add("first", "first", now=0.0)
    for i in range(50):
        engine.add(f"m{i}", f"m{i}", now=6.0)
    now, started = 6.0, 0
    while second not in engine.running:
        now += 0.01
        engine.take(now)
        started += 1
        if second not in engine.running:
            engine.done(next(iter(engine.running)))
    assert (started == 2) == (patience == 5.0)


def test_age_counts_from_when_a_job_came_not_from_when_it_was_added() -> None:
    """Its adapter had to be loaded first; others that came later were added before."""
    engine = Engine(slots=1, running=1, quantum=1, patience=5.0)
    for name in "abc":
        engine.add(name, name, now=3.0)
    late = engine.add("late", "late", now=0.0)
    assert engine.take(6.0) == [late]


@pytest.mark.parametrize("cost", [1, 8])
def test_slots_and_room_come_free_for_a_job_older_than_patience(cost: int) -> None:
    """Both slots and all room are kept busy by members whose turn never ends; only age ends that."""
    engine = Engine(slots=2 if cost == 1 else 3, running=8, quantum=10**6, patience=5.0)
    late, begun = None, math.inf
    for step in range(60):
        now = step / 4
        for adapter in "ababab":
            if sum(j.adapter == adapter for j in engine.waiting) < 3:
                engine.add(adapter, adapter, now=now)
        if step == 4:
            late = engine.add("late", "late", cost, now=now)
        engine.take(now)
        if late in engine.running:
            begun = now
            break
        for adapter in sorted(engine.active):
            engine.done(next(j for j in engine.running if j.adapter == adapter))
    assert 1.0 + 5.0 < begun < 1.0 + 5.0 + 2.0


def test_a_turn_that_age_brings_forward_is_had_whole_and_not_twice() -> None:
    """The fifth of a grows too old in b's turn: a gets its slot, and with it its next turn, which it then skips."""
    engine = Engine(slots=1, running=1, quantum=4, patience=5.5)
    for name in "aaaaa":
        engine.add(name, name, now=0.0)
    for name in "ab" * 30:
        engine.add(name, name, now=1.0)
    order = ""
    for started in range(16):
        [job] = engine.take(1.0 if started < 5 else 6.0)
        order += job.member
        engine.done(job)
    assert order == "aaaabaaaabbbbbbb"


def test_who_comes_back_has_a_whole_turn() -> None:
    """Its account was open all the time, for something of it ran, but it had nothing that waited."""
    engine = Engine(slots=3, running=3, quantum=2)
    engine.add("back", "back", 2)
    for name in "ab" * 30:
        engine.add(name, name)
    [long, other] = engine.take()
    for _ in range(20):
        engine.done(other)
        [other] = engine.take()
    engine.add("back", "back")
    order = ""
    for _ in range(5):
        engine.done(other)
        [other] = engine.take()
        order += other.adapter or ""
    assert long in engine.running
    assert "back" in order


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nobody_starves_while_jobs_end(seed: int) -> None:
    """Others come without end, in any size; what is older than patience waits for those before it only."""
    rng = random.Random(seed)
    engine = Engine(slots=2, running=8, quantum=rng.choice([1, 4, 64]), patience=10.0)
    backlog, longest = 12, 2.0
    ends: dict[Job, float] = {}
    now = 0.0
    while now < 400.0:
        now += 0.5
        while len(engine.waiting) < backlog:
            number = min(7, int(rng.paretovariate(0.7)))
            engine.add(f"m{number}" if number else None, f"m{number}", rng.choice([1, 1, 1, 2, 8, 20]), now=now)
        for job in [j for j, end in ends.items() if end <= now]:
            engine.done(job)
            del ends[job]
        for job in engine.take(now):
            ends[job] = now + rng.uniform(0.5, longest)
            waited = now - job.since
            assert waited <= engine.patience + backlog * 3 * longest


def test_books_that_do_not_fit_are_refused() -> None:
    engine = Engine(slots=1, running=1, quantum=1)
    job = engine.add("a", "a")
    with pytest.raises(ValueError, match="waits or runs"):
        engine.schedule.add(job, adapter="a", member="a", cost=1, now=0.0)
    with pytest.raises(ValueError, match="running job"):
        engine.schedule.done(job)
    with pytest.raises(ValueError, match="cost"):
        engine.add("a", "a", 0)
    engine.take()
    assert not engine.schedule.drop(job)
    with pytest.raises(ValueError, match="slots"):
        Schedule(slots=0, running=1, quantum=1, patience=1.0)
