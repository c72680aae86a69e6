"""Rewards of a prompt become advantages by the formula of the algorithm; what says nothing is dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele_driver.advantages import (
    ADVANTAGES,
    EPSILON,
    centred,
    group_normalised,
    leave_one_out,
    less_the_mean,
    overlong,
)

finite = st.floats(-1e3, 1e3, allow_nan=False)


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=32).filter(lambda r: max(r) - min(r) > 1e-3))
def test_advantages_are_the_formula(rewards: list[float]) -> None:
    r = np.array(rewards, dtype=np.float64)
    expected = (r - r.mean()) / (r.std(ddof=1) + EPSILON)
    np.testing.assert_allclose(np.array(group_normalised(rewards), dtype=np.float64), expected, atol=1e-6)


def test_advantages_match_torch() -> None:
    import torch

    rewards = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0, 1 / 3, 1 / 3, 0.0, 1.0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + EPSILON)
    assert group_normalised(rewards.tolist()) == pytest.approx(expected.tolist())


@settings(deadline=None)
@given(finite, st.integers(1, 16))
def test_a_group_with_equal_rewards_is_dropped(reward: float, n: int) -> None:
    assert group_normalised([reward] * n) == [None] * n


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_bad_reward_takes_no_part(bad: float | None) -> None:
    with_bad = group_normalised([0.0, bad, 1.0, 0.5])
    assert with_bad[1] is None
    assert [a for a in with_bad if a is not None] == group_normalised([0.0, 1.0, 0.5])


def test_one_good_reward_is_not_enough() -> None:
    assert group_normalised([None, 1.0, math.nan]) == [None] * 3


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=32).filter(lambda r: max(r) - min(r) > 1e-3))
def test_each_sample_is_compared_with_the_others(rewards: list[float]) -> None:
    n = len(rewards)
    others = [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    assert leave_one_out(rewards) == pytest.approx(others, abs=1e-6)
    mean = sum(rewards) / n
    assert centred(rewards) == pytest.approx([r - mean for r in rewards], abs=1e-6)
    assert less_the_mean(rewards) == pytest.approx([r - mean for r in rewards], abs=1e-6)


def test_algorithms_differ_in_what_they_do_with_equal_and_bad_rewards() -> None:
    for name, rule in ADVANTAGES.items():
        whitened = name.startswith("REINFORCE++")
        equal = {"REINFORCE++": 0.5, "REINFORCE++Baseline": 0.0}.get(name)
        assert rule([0.5, 0.5]) == [equal, equal], name
        assert rule([0.5]) == [equal if whitened else None], name
        assert rule([None, math.nan, 0.25, 0.75])[:2] == [None, None], name
        assert all(a is not None for a in rule([None, math.nan, 0.25, 0.75])[2:]), name


def test_an_answer_loses_linearly_over_the_last_tokens_before_the_longest() -> None:
    found = [overlong(n, longest=20, cache=4, penalty=0.5) for n in (1, 16, 17, 18, 20, 25)]
    assert found == [0, 0, -0.125, -0.25, -0.5, -0.5]
