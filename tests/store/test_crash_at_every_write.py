"""A process that dies at any write leaves whole steps only, loses nothing that it was told is done, and a successor
finishes its work as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from allele.store.collect import survey
from allele.store.facts import now
from tests.store.crash import FORKS, Laboratory, Prepared, check_end, check_rest, drain, observe
from tests.store.scenarios import AT_ONCE, BEFORE, FRESH, LIFE, SCENARIOS, Death, doomed, open_store, some, work

KILLS_AT_ONCE = 4
"""Most of a kill is waiting."""

MOMENTS = 20


def kill_all(laboratory: Laboratory, prepared: Prepared, deaths: Iterable[tuple[Death, ...]]) -> None:
    with ThreadPoolExecutor(KILLS_AT_ONCE) as pool:
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


def test_the_collector_that_is_killed_has_each_kind_of_work(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}", {})
    session = work(store, BEFORE, first=1)
    plans = []
    for operation in SCENARIOS["collect"]:
        plans.append(survey(store, policy=AT_ONCE, now=now()))
        operation(session, len(BEFORE))
    retiring, compacting, deleting = plans
    assert retiring.retire and compacting.compact and deleting.delete


def test_killed_at_many_writes_of_a_longer_life(laboratory: Laboratory) -> None:
    prepared = laboratory.prepare(LIFE, before=BEFORE)
    kill_all(laboratory, prepared, every_write(prepared)[::7])


def test_killed_at_every_write_of_the_first_work_on_a_population(laboratory: Laboratory) -> None:
    prepared = laboratory.prepare(FRESH, before=())
    kill_all(laboratory, prepared, every_write(prepared))


def test_successors_killed_as_well(laboratory: Laboratory) -> None:
    prepared = laboratory.prepare(some(seed=5), before=BEFORE)
    deaths = [(Death(n, True), Death(1 + n % 4, n % 2 == 0), Death(2, False)) for n in range(1, prepared.writes + 1, 5)]
    kill_all(laboratory, prepared, deaths)


def test_killed_at_any_moment_on_files(tmp_path: Path) -> None:
    """No proxy counts the writes of a folder: the moments are spread over the time that the work takes."""
    operations = FRESH + LIFE
    undisturbed = open_store(f"file://{tmp_path}/undisturbed", {})
    work(undisturbed, (), first=1)  # so that nothing is imported in the time measured
    begun = time.monotonic()
    work(undisturbed, operations, first=1)
    seconds = time.monotonic() - begun
    prepared = observe(undisturbed, operations, first=1)
    killed = sum(kill_on_files(f"file://{tmp_path}/{i}", prepared, seconds * i / MOMENTS) for i in range(MOMENTS))
    assert killed > MOMENTS / 2, "most died on the way"


def kill_on_files(url: str, prepared: Prepared, after: float) -> bool:
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(
        target=doomed, args=(url, {}, prepared.operations), kwargs={"first": 1, "acknowledged": sender}
    )
    process.start()
    sender.close()
    receiver.recv()
    time.sleep(after)
    process.kill()
    process.join()
    check_rest(open_store(url, {}), prepared, drain(receiver))
    check_end(open_store(url, {}), prepared)
    return process.exitcode != 0
