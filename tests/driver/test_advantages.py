"""Rewards of a group become advantages by GRPO's formula; what says nothing is dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele_driver.advantages import EPSILON, group_normalised
from allele_driver.environments import Prompt
from allele_driver.rollouts import Drawn, PromptGroup

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


def test_rows_carry_exactly_what_the_engine_returned() -> None:
    drawn = tuple(Drawn((i, 1), (-0.5 * i, -0.1), "stop") for i in (3, 4, 5))
    group = PromptGroup("m", 7, Prompt(text="x", ids=(9, 2)), drawn, (0.0, math.nan, 1.0))
    rows = group.train_rows()
    assert [(r.completion, r.logprobs) for r in rows] == [((3, 1), (-1.5, -0.1)), ((5, 1), (-2.5, -0.1))]
    assert {r.prompt for r in rows} == {(9, 2)}
    assert rows[0].advantage == -rows[1].advantage < 0
    assert group.kept_rewards() == [0.0, 1.0]
