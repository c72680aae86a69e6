"""Batched or one by one follows from what was timed, and from nothing else."""

from __future__ import annotations

import pytest

from allele.protocol.commands import Mode
from allele_trainer.server.cost import ENOUGH, CostModel


def timed(*, overhead: float, token: float, batched_token: float, member: float) -> CostModel:
    """Micro-batches of a machine where these are the costs in seconds."""
    model = CostModel(max_tokens=4096, padded_to=64)
    for n in (64, 256, 512, 1024, 2048):
        model.note(tokens=n, members=1, seconds=overhead + token * n)
    for n, members in ((512, 8), (1024, 4), (4096, 64), (4096, 16), (2048, 256)):
        model.note(tokens=n, members=members, seconds=overhead + batched_token * n + member * members)
    return model


@pytest.mark.parametrize(
    ("units", "chosen"), [([8] * 256, "Batched"), ([2048] * 4, "OneByOne"), ([1024] * 2, "OneByOne"), ([64], "Batched")]
)
def test_small_units_are_batched_and_large_ones_are_not_where_large_batches_are_slow(
    units: list[int], chosen: Mode
) -> None:
    model = timed(overhead=0.01, token=1e-5, batched_token=2e-5, member=1e-5)
    assert model.choose(units) == chosen
    assert model.choose(units) == chosen


def test_where_batching_costs_nothing_it_always_wins() -> None:
    model = timed(overhead=0.01, token=1e-5, batched_token=1e-5, member=1e-6)
    assert all(model.choose([n] * 8) == "Batched" for n in (8, 64, 512, 2048))


def test_batched_until_both_ways_are_known_and_curiosity_ends() -> None:
    model = CostModel(max_tokens=4096, padded_to=64)
    for _ in range(ENOUGH):
        assert model.curious([8, 8]) and not model.curious([8])
        assert model.choose([2048] * 4) == "Batched"
        model.note(tokens=8, members=1, seconds=1e-6)
        model.note(tokens=4096, members=2, seconds=9.0)
    assert not model.curious([8, 8])
    assert model.choose([8] * 600) == "OneByOne"
