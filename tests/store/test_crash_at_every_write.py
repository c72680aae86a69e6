"""A process that dies at any write leaves whole steps only, loses nothing that it was told is done, and a successor
finishes its work as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.store.crash import Laboratory, Prepared
from tests.store.scenarios import BEFORE, FRESH, SCENARIOS, Death, some

AT_ONCE = 4
"""Kills; most of one is waiting."""


def kill_all(laboratory: Laboratory, prepared: Prepared, deaths: Iterable[tuple[Death, ...]]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = {d: pool.submit(laboratory.kill, prepared, d) for d in deaths}
    failed = {d: e for d, o in outcomes.items() if (e := o.exception())}
    assert not failed, f"{len(failed)} of {len(outcomes)} kills: {failed}"
    survived = [d for d, o in outcomes.items() if len(d) == 1 and not o.result()]
    assert not survived, f"nobody was killed at {survived}"


def every_write(prepared: Prepared) -> list[tuple[Death, ...]]:
    return [(Death(n, after),) for n in range(1, prepared.writes + 1) for after in (False, True)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_write(laboratory: Laboratory, name: str) -> None:
    prepared = laboratory.prepare(SCENARIOS[name], before=BEFORE)
    kill_all(laboratory, prepared, every_write(prepared))


def test_killed_at_every_write_of_the_first_work_on_a_population(laboratory: Laboratory) -> None:
    prepared = laboratory.prepare(FRESH, before=())
    kill_all(laboratory, prepared, every_write(prepared))


def test_successors_killed_as_well(laboratory: Laboratory) -> None:
    prepared = laboratory.prepare(some(seed=5), before=BEFORE)
    deaths = [(Death(n, True), Death(1 + n % 4, n % 2 == 0), Death(2, False)) for n in range(1, prepared.writes + 1)]
    kill_all(laboratory, prepared, deaths)
