"""What retention lets go, and that it never lets go what anybody may still need."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele.protocol.commands import ByteRange
from allele.store import Fact, ObjectInfo
from allele.store.facts import to_arrow
from allele.store.history import History
from allele.store.retention import Plan, Policy, plan

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
GRACE = timedelta(hours=24)
STRICT = Policy(keep_last=1, max_policy_lag=0, grace=GRACE)
"""Keeps as little as a policy can: the newest, and the one that the newest lag reaches."""


@dataclasses.dataclass
class World:
    """A population without a store: facts, objects with their age and the ranges that were written, and a clock."""

    facts: list[Fact] = dataclasses.field(default_factory=list)
    objects: dict[str, ObjectInfo] = dataclasses.field(default_factory=dict)
    now: datetime = BEGIN
    names: Iterable[int] = dataclasses.field(default_factory=itertools.count)

    def say(self, *facts: Fact) -> None:
        self.now += timedelta(seconds=1)
        self.facts += [dataclasses.replace(f, time=self.now, run=f.run or "run") for f in facts]

    def wait(self, time: timedelta = GRACE) -> None:
        self.now += time

    def write(self, lengths: list[int], folder: str = "segments") -> list[ByteRange]:
        name = next(self.names)  # type: ignore[call-overload]
        path = f"{folder}/{name:04}.seg"
        ends = list(itertools.accumulate(lengths))
        self.objects[path] = ObjectInfo(path, ends[-1], self.now)
        return [
            ByteRange(path=path, offset=end - n, length=n, digest=f"{path}+{end}")
            for end, n in zip(ends, lengths, strict=True)
        ]

    def commit(self, *revisions: tuple[str, int], state: bool = False, size: int = 10, **fields: object) -> None:
        """A commit of revisions of several members, their weights in one segment and their states in another."""
        weights = self.write([size] * len(revisions))
        states = self.write([3 * size] * len(revisions), "states") if state else [None] * len(revisions)
        self.say(
            *(
                Fact.committed(member=m, revision=r, weights=w, state=s, shape="s", **fields)
                for (m, r), w, s in zip(revisions, weights, states, strict=True)
            )
        )

    def event(self, kind: str, member: str, revision: int | None) -> None:
        self.say(Fact(kind=kind, member=member, revision=revision))  # type: ignore[arg-type]

    def plan(self, policy: Policy = STRICT) -> Plan:
        return plan(to_arrow(self.facts), list(self.objects.values()), policy=policy, now=self.now)

    def apply(self, made: Plan) -> None:
        """What a collector does with it."""
        if made.facts():
            self.say(*made.facts())
        for item in made.compact:
            self.compact(item.path, item.ranges)
        for gone in made.delete:
            del self.objects[gone.path]

    def compact(self, path: str, ranges: tuple[ByteRange, ...]) -> None:
        new = self.write([r.length for r in ranges], path.partition("/")[0])
        moves = dict(zip(ranges, new, strict=True))
        for fact in [f for h in self.histories() for f in h.committed.values()]:
            if (to := moves.get(fact.weights)) is not None:  # type: ignore[arg-type]
                fact = dataclasses.replace(fact, segment=to.path, offset=to.offset, digest=to.digest)
            elif (to := moves.get(fact.state)) is not None:  # type: ignore[arg-type]
                place = {"state_segment": to.path, "state_offset": to.offset, "state_digest": to.digest}
                fact = dataclasses.replace(fact, **place)
            else:
                continue
            self.say(fact)

    def histories(self) -> list[History]:
        members = dict.fromkeys(f.member for f in self.facts)
        return [History.of(m, [f for f in self.facts if f.member == m]) for m in members]

    def history(self, member: str = "m") -> History:
        return next(h for h in self.histories() if h.member == member)


@pytest.fixture
def world() -> World:
    return World()


def retired(made: Plan) -> list[tuple[str, int | None]]:
    return [(r.fact.member, r.fact.revision) for r in made.retire]


def revisions(world: World, count: int, **fields: object) -> None:
    """Revisions 1 to `count` of m, each in a segment of its own, all older than the grace period."""
    for r in range(1, count + 1):
        world.commit(("m", r), **fields)  # type: ignore[arg-type]
    world.wait()


def test_an_empty_population_has_nothing_to_collect(world: World) -> None:
    assert not world.plan()


def test_all_but_the_newest_go(world: World) -> None:
    revisions(world, 6)
    assert retired(world.plan(Policy(keep_last=3))) == [("m", 1), ("m", 2), ("m", 3)]
    assert world.plan(Policy(keep_last=3)).retire[0].reason == "not among the newest 3"


def test_nothing_young_goes(world: World) -> None:
    revisions(world, 3)
    for r in range(4, 9):
        world.commit(("m", r))
    assert retired(world.plan()) == [("m", 1), ("m", 2), ("m", 3)]


@pytest.mark.parametrize(("lag", "left"), [(0, [5, 6]), (1, [4, 5, 6]), (3, [2, 3, 4, 5, 6]), (64, [1, 2, 3, 4, 5, 6])])
def test_what_a_lagging_sample_may_name_stays(world: World, lag: int, left: list[int]) -> None:
    revisions(world, 6)
    gone = [r for _, r in retired(world.plan(dataclasses.replace(STRICT, max_policy_lag=lag)))]
    assert gone == [r for r in range(1, 7) if r not in left]


def test_every_nth_stays(world: World) -> None:
    revisions(world, 10)
    gone = [r for _, r in retired(world.plan(dataclasses.replace(STRICT, every=4)))]
    assert gone == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("events", "kept"),
    [
        ([("Exposed", 2)], {2}),
        ([("Exposed", 2), ("Exposed", 3)], {2, 3}),
        ([("Exposed", 2), ("Exposed", 3), ("Exposed", 5)], {3, 5}),
        ([("Exposed", 2), ("Exposed", 3), ("Exposed", 3)], {2, 3}),
        ([("Held", 4)], {4}),
        ([("Exposed", 1), ("Exposed", 2), ("Exposed", 3), ("Held", 2)], {1, 2, 3}),
        ([("Held", 4), ("Held", None)], set()),
        ([("Pinned", 1), ("Pinned", 3)], {1, 3}),
        ([("Pinned", 1), ("Pinned", 3), ("Unpinned", 1)], {3}),
        ([("Pinned", 1), ("Unpinned", 1), ("Pinned", 1)], {1}),
    ],
)
def test_what_is_served_held_or_pinned_stays(
    world: World, events: list[tuple[str, int | None]], kept: set[int]
) -> None:
    revisions(world, 8)
    for kind, revision in events:
        world.event(kind, "m", revision)
    gone = {r for _, r in retired(world.plan())}
    assert gone == set(range(1, 7)) - kept


def test_abandoned_revisions_go_and_do_not_count_as_newest(world: World) -> None:
    revisions(world, 5)
    world.event("Abandoned", "m", 4)
    world.event("Abandoned", "m", 5)
    made = world.plan()
    assert retired(made) == [("m", 1), ("m", 4), ("m", 5)]
    assert [r.reason for r in made.retire] == ["not among the newest 1", "abandoned", "abandoned"]


def test_members_do_not_share_their_newest(world: World) -> None:
    for r in (1, 2, 3):
        world.commit(("a", r), ("b", r))
    world.commit(("b", 4))
    world.wait()
    assert retired(world.plan()) == [("a", 1), ("b", 1), ("b", 2)]


def dropped(made: Plan) -> list[int | None]:
    return [d.fact.revision for d in made.drop]


def test_two_states_stay_to_resume_from(world: World) -> None:
    revisions(world, 6, state=True)
    made = world.plan(Policy(keep_last=6))
    assert dropped(made) == [1, 2, 3, 4]
    world.apply(made)
    known = world.history().committed
    assert [known[r].state is not None for r in range(1, 7)] == [False] * 4 + [True] * 2
    assert all(known[r].weights is not None and known[r].run == "run" for r in known)


def test_a_revision_does_not_become_young_again_when_its_state_goes(world: World) -> None:
    revisions(world, 6, state=True)
    world.apply(world.plan(Policy(keep_last=6)))
    assert retired(world.plan()) == [("m", 1), ("m", 2), ("m", 3), ("m", 4)]


def test_states_of_pinned_and_served_revisions_stay(world: World) -> None:
    revisions(world, 6, state=True)
    world.event("Pinned", "m", 1)
    world.event("Exposed", "m", 3)
    assert dropped(world.plan(Policy(keep_last=6))) == [2, 4]


def test_the_state_that_a_run_would_resume_from_stays_whatever_came_after(world: World) -> None:
    revisions(world, 2, state=True, run="suspended")
    for r in (3, 4, 5, 6):
        world.commit(("m", r), state=True, run="later")
    world.wait()
    without = world.plan()
    made = world.plan(dataclasses.replace(STRICT, runs=frozenset({"suspended"})))
    assert 2 in [r for _, r in retired(without)]
    assert 2 not in [r for _, r in retired(made)] and 2 not in dropped(made)


def test_a_revision_that_is_resumed_from_outlives_newer_ones_without_state(world: World) -> None:
    revisions(world, 1, state=True)
    for r in (2, 3, 4):
        world.commit(("m", r))
    world.wait()
    assert retired(world.plan()) == [("m", 2)]


def test_bytes_go_a_grace_period_after_the_revision(world: World) -> None:
    revisions(world, 3)
    made = world.plan()
    assert retired(made) == [("m", 1)] and not made.delete
    world.apply(made)
    assert not world.plan()
    world.wait(GRACE - timedelta(seconds=2))
    assert not world.plan()
    world.wait(timedelta(seconds=2))
    assert [d.path for d in world.plan().delete] == ["segments/0000.seg"]
    world.apply(world.plan())
    assert not world.plan()


def test_garbage_goes_when_it_is_old(world: World) -> None:
    world.write([10])
    world.write([30], "states")
    world.wait(GRACE - timedelta(seconds=1))
    assert not world.plan()
    world.wait(timedelta(seconds=1))
    assert [(d.path, d.reason) for d in world.plan().delete] == [
        ("segments/0000.seg", "no fact names it"),
        ("states/0001.seg", "no fact names it"),
    ]


def test_provenance_stays_while_a_fact_names_it_even_of_retired_revisions(world: World) -> None:
    revisions(world, 3, provenance="a")
    for name in ("a", "b"):
        world.objects[name] = ObjectInfo(f"provenance/{name}.json", 5, BEGIN)
    world.apply(world.plan(Policy(keep_last=1, grace=timedelta(days=9))))
    assert [d.path for d in world.plan().delete] == ["provenance/b.json"]


def test_a_retired_revision_that_is_pinned_or_served_after_all_keeps_its_bytes(world: World) -> None:
    revisions(world, 4)
    world.apply(world.plan())
    world.event("Pinned", "m", 1)
    world.event("Held", "m", 2)
    world.wait()
    assert not world.plan().delete


def test_a_sparse_segment_is_compacted_and_goes_a_grace_period_later(world: World) -> None:
    world.commit(*((f"m{i}", 1) for i in range(5)))
    for r in (2, 3):
        world.commit(*((f"m{i}", r) for i in range(3)))
    world.wait()
    world.apply(world.plan())
    assert not world.plan(), "the retired ranges are still in their grace period"
    world.wait()
    made = world.plan()
    assert [(c.path, [r.offset for r in c.ranges]) for c in made.compact] == [("segments/0000.seg", [30, 40])]
    assert made.compact[0].reason == "20 of 50 bytes are needed"
    assert not made.delete
    world.apply(made)
    assert {h.committed[1].segment for h in world.histories() if 1 not in h.retired} == {"segments/0003.seg"}
    assert not world.plan(), "readers may still hold the old place"
    world.wait()
    assert [d.path for d in world.plan().delete] == ["segments/0000.seg"]


def test_half_full_is_not_sparse(world: World) -> None:
    world.commit(("a", 1), ("b", 1))
    for r in (2, 3):
        world.commit(("a", r))
    world.wait()
    world.apply(world.plan())
    world.wait()
    assert not world.plan().compact


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.sets(st.sampled_from("abc"), min_size=1), st.booleans()),
        st.tuples(
            st.sampled_from(["Exposed", "Held", "Pinned", "Unpinned", "Abandoned"]),
            st.sampled_from("abc"),
            st.integers(0, 3),
        ),
        st.tuples(st.just("lift"), st.sampled_from("abc"), st.just(0)),
        st.tuples(st.just("garbage"), st.integers(1, 50), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 30), st.just(0)),
        st.tuples(st.just("collect"), st.just(0), st.just(0)),
    ),
    max_size=60,
)
POLICIES = st.builds(
    Policy,
    keep_last=st.integers(1, 3),
    every=st.integers(0, 4),
    max_policy_lag=st.integers(0, 2),
    runs=st.sets(st.sampled_from(["run0", "run1"])).map(frozenset),
    grace=st.just(GRACE),
)


@dataclasses.dataclass
class Truth:
    """One member as the test itself keeps book of it, without History."""

    standing: dict[int, str | None] = dataclasses.field(default_factory=dict)
    """Revision → run whose state it has."""
    committed: list[int] = dataclasses.field(default_factory=list)
    exposed: int | None = None
    held: int | None = None
    pinned: set[int] = dataclasses.field(default_factory=set)
    born: dict[int, datetime] = dataclasses.field(default_factory=dict)

    def must_have_weights(self, policy: Policy, now: datetime) -> set[int]:
        newest = sorted(self.standing, reverse=True)
        young = {r for r, t in self.born.items() if now - t < policy.grace}
        nth = {r for r in newest if policy.every and r % policy.every == 0}
        lag = set(newest[: policy.max_policy_lag + 2])
        served = {r for r in (self.exposed, self.held) if r is not None}
        return young | nth | lag | served | self.pinned | set(newest[: policy.keep_last]) | self.must_have_state(policy)

    def must_have_state(self, policy: Policy) -> set[int]:
        with_state = [r for r in sorted(self.standing, reverse=True) if self.standing[r]]
        of_runs = {next((r for r in with_state if self.standing[r] == run), None) for run in policy.runs}
        return set(with_state[:2]) | {r for r in of_runs if r is not None}


def play(
    operations: list[tuple[str, object, object]], policy: Policy, *, shared: bool
) -> tuple[World, dict[str, Truth]]:
    """Runs the operations, collecting on the way; checks after each pass that nothing needed is gone."""
    world, truths = World(), {m: Truth() for m in "abc"}
    for i, (what, which, more) in enumerate(operations):
        match what:
            case "commit":
                members = sorted(which)  # type: ignore[call-overload]
                run, named = f"run{i % 2}", [(m, len(truths[m].committed) + 1) for m in members]
                for group in [named] if shared else [[n] for n in named]:
                    world.commit(*group, state=bool(more), run=run)
                for m, r in named:
                    truths[m].committed.append(r)
                    truths[m].standing[r] = run if more else None
                    truths[m].born[r] = world.now
            case "wait":
                world.wait(timedelta(hours=which))  # type: ignore[arg-type]
            case "garbage":
                world.write([which])  # type: ignore[list-item]
            case "collect":
                collect(world, truths, policy)
            case _:
                event(world, truths[str(which)], str(which), what, more)
    return world, truths


def event(world: World, truth: Truth, member: str, what: str, back: object) -> None:
    """`back` counts from the newest standing revision; nothing happens when there is none."""
    newest = sorted(truth.standing, reverse=True)
    if what == "lift":
        truth.held = None
        world.event("Held", member, None)
        return
    if not newest:
        return
    revision = newest[min(int(str(back)), len(newest) - 1)]
    world.event(what, member, revision)
    match what:
        case "Exposed":
            truth.exposed = revision
        case "Held":
            truth.held = revision
        case "Pinned":
            truth.pinned.add(revision)
        case "Unpinned":
            truth.pinned.discard(revision)
        case "Abandoned":
            del truth.standing[revision]


def collect(world: World, truths: dict[str, Truth], policy: Policy) -> Plan:
    made = world.plan(policy)
    needed = {m: t.must_have_weights(policy, world.now) for m, t in truths.items()}
    states = {m: t.must_have_state(policy) for m, t in truths.items()}
    world.apply(made)
    for history in world.histories():
        for r in needed[history.member]:
            where = history.committed[r].weights
            assert r not in history.retired and where is not None and where.path in world.objects
        for r in states[history.member]:
            state = history.committed[r].state
            assert state is not None and state.path in world.objects
        for r in history.retired:
            truths[history.member].standing.pop(r, None)
        for r, fact in history.committed.items():
            if fact.state is None and truths[history.member].standing.get(r):
                truths[history.member].standing[r] = None
    return made


@given(OPERATIONS, POLICIES, st.booleans())
def test_nothing_needed_ever_goes_and_everything_else_does(
    operations: list[tuple[str, object, object]], policy: Policy, shared: bool
) -> None:
    world, truths = play(operations, policy, shared=shared)
    collect(world, truths, policy)
    assert not world.plan(policy), "a plan that was carried out is done"
    for _ in range(4):
        world.wait(GRACE + timedelta(hours=1))
        collect(world, truths, policy)
        assert not world.plan(policy)
    needed: dict[str, int] = {}
    for history in world.histories():
        for r in history.committed.keys() - history.retired.keys():
            for place in (history.committed[r].weights, history.committed[r].state):
                if place is not None:
                    needed[place.path] = needed.get(place.path, 0) + place.length
    assert needed.keys() == world.objects.keys()
    for path, size in needed.items():
        assert size <= world.objects[path].size <= 2 * size
        assert shared or size == world.objects[path].size
