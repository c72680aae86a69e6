"""On the traffic that catalogues of adapters see, a tier has what is asked for more often than simpler policies."""

from __future__ import annotations

import pytest

from allele.residency.traces import zipf
from bench.rollout.hits import Fifo, Lru, Ours, ratio


@pytest.mark.parametrize(
    ("exponent", "places", "members", "fifo", "lru", "tinylfu"),
    [
        (1.0, 64, 1_000_000, 0.165, 0.195, 0.328),
        (1.0, 512, 1_000_000, 0.316, 0.351, 0.457),
        (1.2, 64, 100_000, 0.500, 0.554, 0.667),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_hit_ratios_are_those_published(
    exponent: float, places: int, members: int, fifo: float, lru: float, tinylfu: float, seed: int
) -> None:
    names = zipf(members, exponent, 60_000, seed=seed)
    assert ratio(Fifo(places), names) == pytest.approx(fifo, abs=0.012)
    assert ratio(Lru(places), names) == pytest.approx(lru, abs=0.012)
    found = ratio(Ours(places), names)
    assert tinylfu - 0.02 < found
    assert found > 1.17 * ratio(Lru(places), names)
