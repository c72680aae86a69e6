"""Who trains when: turns are fair, waves fit the slots, and the state is saved in time."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.api.run import Optimizer
from allele_driver.cohorts import cohort, saves_state, turns, waves
from allele_driver.schedule import learning_rate

sizes = st.one_of(st.none(), st.integers(1, 40))


@settings(deadline=None)
@given(n=st.integers(1, 30), size=sizes, steps=st.integers(1, 60))
def test_turns_differ_by_at_most_one(n: int, size: int | None, steps: int) -> None:
    members = list(range(n))
    counts = Counter(dict.fromkeys(members, 0))
    for step in range(1, steps + 1):
        chosen = cohort(members, step=step, size=size)
        assert len(set(chosen)) == len(chosen) == min(n, size or n)
        counts.update(chosen)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert counts == {m: turns(m, members=n, step=steps, size=size) for m in members}


@settings(deadline=None)
@given(n=st.integers(0, 100), size=st.integers(1, 20))
def test_waves_hold_every_member_once_and_tell_which_comes_next(n: int, size: int) -> None:
    found = list(waves(range(n), size=size))
    assert [m for wave, _ in found for m in wave] == list(range(n))
    assert all(1 <= len(wave) <= size for wave, _ in found)
    assert len(found) == -(-n // size)
    assert [following for _, following in found] == [wave for wave, _ in found[1:]] + [()] * bool(found)


@settings(deadline=None)
@given(n=st.integers(1, 12), size=sizes, steps=st.integers(1, 40), every=st.integers(1, 7))
def test_state_is_saved_every_few_turns_and_at_the_last(n: int, size: int | None, steps: int, every: int) -> None:
    unsaved = Counter(dict.fromkeys(range(n), 0))
    for step in range(1, steps + 1):
        for m in cohort(range(n), step=step, size=size):
            unsaved[m] += 1
            if saves_state(m, members=n, step=step, steps=steps, size=size, every=every):
                unsaved[m] = 0
            assert unsaved[m] < every
    assert not +unsaved


def test_learning_rate_goes_linearly_to_its_final_fraction() -> None:
    optimizer = Optimizer(learning_rate=0.006, schedule="Linear", final_fraction=0.2)
    rates = [learning_rate(optimizer, step=s, horizon=41) for s in range(1, 45)]
    assert (rates[0], rates[40]) == pytest.approx((0.006, 0.0012))
    assert rates[20] == pytest.approx(0.0036)
    assert all(a > b for a, b in itertools.pairwise(rates[:41]))
    assert set(rates[40:]) == {rates[40]}
    constant = Optimizer(learning_rate=0.01)
    assert {learning_rate(constant, step=s, horizon=9) for s in (1, 5, 9)} == {0.01}
    assert learning_rate(optimizer, step=1, horizon=1) == 0.006


def test_learning_rate_warms_up_and_falls_as_half_a_cosine() -> None:
    optimizer = Optimizer(learning_rate=0.01, schedule="Cosine", warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(optimizer, step=s, horizon=24) for s in range(1, 27)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    for step in range(4, 25):
        shape = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 20)) / 2
        assert rates[step - 1] == pytest.approx(0.01 * shape)
    assert rates[23:] == pytest.approx([0.001] * 3)
