"""A tier never exceeds its bounds, never evicts what is held, and keeps what is used often."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.residency import Tier, TierFull
from allele.residency.frequency import TOP, Frequency, key

NAMES = st.sampled_from("abcdefghijklmnop")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), NAMES, st.integers(0, 5), st.booleans()),
        st.tuples(st.sampled_from(["touch", "pin", "unpin", "remove"]), NAMES, st.just(0), st.just(False)),
        st.tuples(st.just("supersede"), NAMES, st.just(0), st.just(False)),
    ),
    max_size=120,
)


class Books:
    """What is kept, its sizes and pins, written the plain way; it does not know who has to go."""

    def __init__(self, places: int | None, capacity: int) -> None:
        self.places, self.capacity = places, capacity
        self.size: dict[str, int] = {}
        self.pins: dict[str, int] = {}

    def fits(self, kept: dict[str, int], size: int) -> bool:
        return (self.places is None or len(kept) < self.places) and sum(kept.values()) + size <= self.capacity

    def admit(self, tier: Tier[str], name: str, size: int, pin: bool) -> None:
        held = {n: s for n, s in self.size.items() if self.pins[n]}
        if name not in self.size and not self.fits(held, size):
            before = tier.names()
            with pytest.raises(TierFull):
                tier.admit(name, size=size, pin=pin)
            assert tier.names() == before
            return
        next_to_go = tier.victim()
        evicted = tier.admit(name, size=size, pin=pin)
        if name not in self.size:
            for victim in evicted:
                assert not self.fits(self.size, size), f"{victim} went although there was room"
                assert not self.pins.pop(victim)
                del self.size[victim]
            assert evicted[:1] in ([], [next_to_go])
            self.size[name], self.pins[name] = size, 0
        else:
            assert not evicted
        self.pins[name] += pin

    def step(self, tier: Tier[str], action: str, name: str) -> None:
        if name not in self.size:
            assert getattr(tier, action)(name) is False
            return
        getattr(tier, action)(name)
        self.pins[name] += {"pin": 1, "unpin": -1}.get(action, 0)
        if action == "remove":
            del self.size[name], self.pins[name]


@settings(max_examples=400, deadline=None)
@given(steps=STEPS, places=st.one_of(st.none(), st.integers(1, 8)), capacity=st.integers(1, 24))
def test_a_tier_keeps_its_bounds_and_its_books(
    steps: list[tuple[str, str, int, bool]], places: int | None, capacity: int
) -> None:
    tier: Tier[str] = Tier(places=places, capacity=capacity)
    books = Books(places, capacity)
    for action, name, size, pin in steps:
        if action == "admit":
            books.admit(tier, name, size, pin)
        elif action == "supersede":
            tier.supersede(name, by=name + "'")
        elif action == "unpin" and not books.pins.get(name):
            with pytest.raises(ValueError, match="no pin" if name in books.size else "no entry"):
                tier.unpin(name)
        elif action == "remove" and books.pins.get(name):
            with pytest.raises(ValueError, match="expected no pins"):
                tier.remove(name)
        else:
            books.step(tier, action, name)
        assert sorted(tier.names()) == sorted(books.size)
        assert len(tier) == len(books.size)
        assert tier.bytes == sum(books.size.values()) <= capacity
        assert places is None or len(tier) <= places
        assert all(tier.pins(n) == p for n, p in books.pins.items())
        victim = tier.victim()
        assert victim is None if all(books.pins.values()) else not books.pins[str(victim)]


def test_admission_is_refused_whole_when_what_is_left_is_held() -> None:
    tier: Tier[str] = Tier(capacity=10)
    tier.admit("old", size=4)
    tier.admit("held", size=6, pin=True)
    with pytest.raises(TierFull):
        tier.admit("large", size=5)
    assert "old" in tier


def test_a_tier_without_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="without bound"):
        Tier()


@pytest.mark.parametrize("places", [8, 64, 1000])
def test_a_scan_over_cold_names_leaves_the_hot_ones(places: int) -> None:
    tier: Tier[str] = Tier(places=places)
    hot = [f"hot{i}" for i in range(places * 3 // 4)]
    for _ in range(4):
        for name in hot:
            tier.admit(name)
    for i in range(5 * places):
        tier.admit(f"cold{i}")
    assert all(name in tier for name in hot)


def test_what_became_popular_takes_the_place_of_what_was() -> None:
    tier: Tier[str] = Tier(places=64)
    for generation in ("old", "new"):
        for _ in range(100):
            for i in range(64):
                tier.admit(f"{generation}{i}")
    assert sum(f"new{i}" in tier for i in range(64)) > 56


def test_a_name_that_left_is_known_when_it_comes_back() -> None:
    tier: Tier[str] = Tier(places=4)
    for _ in range(9):
        tier.admit("known")
    for name in "abcd" * 6:
        tier.admit(name)
    tier.remove("known")
    for name in ("known", "stranger"):
        tier.admit(name)
    for i in range(20):
        tier.admit(f"stranger{i}")
    assert "known" in tier
    assert "stranger" not in tier


def test_a_use_while_held_counts_once() -> None:
    """A pin is a use unless its caller counts for itself, and so is an admission that pins; to let go is none."""
    tier: Tier[str] = Tier(places=8)
    tier.admit("a", pin=True)
    tier.pin("a")
    tier.touch("a")
    assert tier.pin("a", use=False)
    assert not tier.pin("b", use=False)
    for _ in range(tier.pins("a")):
        tier.unpin("a")
    assert tier.victim() == "a"
    assert tier._frequency.estimate(key("a")) == 3


def test_a_new_revision_inherits_the_place_of_the_one_it_supersedes() -> None:
    tier: Tier[str] = Tier(places=8)
    members = range(7)
    for _ in range(10):
        for m in members:
            tier.admit(f"{m}@1")
    for m in members:
        tier.supersede(f"{m}@1", by=f"{m}@2")
    evicted = [name for m in members for name in tier.admit(f"{m}@2")]
    evicted += [name for i in range(20) for name in tier.admit(f"cold{i // 2}")]
    assert {f"{m}@1" for m in members} <= set(evicted)
    assert all(f"{m}@2" in tier for m in members)


def test_a_superseded_revision_that_is_still_used_stays() -> None:
    tier: Tier[str] = Tier(places=4)
    for name in ("old", "a", "b", "c"):
        tier.admit(name)
    tier.supersede("old", by="new")
    tier.touch("old")
    assert tier.victim() != "old"


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.integers(0, 300).map(str), max_size=1500), entries=st.integers(1, 64))
def test_a_frequency_is_never_below_the_uses(names: list[str], entries: int) -> None:
    frequency = Frequency(entries)
    for name in names:
        frequency.count(key(name))
    frequency.grow(entries * 9)
    for name in set(names):
        assert min(names.count(name), TOP) <= frequency.estimate(key(name)) <= TOP


def test_frequencies_fade() -> None:
    frequency = Frequency(1)
    for _ in range(20):
        frequency.count(key("once popular"))
    for i in range(10_000):
        frequency.count(key(f"another{i}"))
    assert frequency.estimate(key("once popular")) < TOP // 2


def test_the_same_requests_leave_the_same_tier_in_every_process() -> None:
    """Text hashes differ by process; a tier's decisions must not."""
    code = (
        "import random; from allele.residency import Tier; from allele.residency.frequency import key;"
        "tier = Tier(places=8); rng = random.Random(1);"
        "[tier.admit(str(int(rng.paretovariate(0.3)))) for _ in range(20000)]; print(tier.names(), key('a'))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in range(2)
    }
    assert len(seen) == 1
