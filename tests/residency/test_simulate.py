"""The model gives what was published about cold adapters beside warm traffic, and counts every request once."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from allele.residency.replica import BULK, NATIVE, PUBLISHED, Costs, Setup
from allele.residency.simulate import Mode, Outcome, simulate
from allele.residency.traces import BadTrace, Publish, Request, Traffic, read, zipf


def outcomes(traffic: Traffic, setup: Setup, costs: Costs = BULK) -> dict[Mode, Outcome]:
    events = traffic.events()
    return {mode: simulate(events, mode, setup=setup, costs=costs) for mode in Mode}


def test_readiness_admission_orders_as_published() -> None:
    """MinT (arXiv 2605.13779): warm p95 and stalls while cold revisions are activated. Off: 24.03 s and 10; admission:
    9.71 s and 0; two-phase: 9.63 s and 0, hardly better for who was warm, but nobody waits for a load."""
    setup = Setup(slots=16, warm=256, running=32, prompt=1024, loads=1, settle=400.0)
    found = []
    for seed in range(8):
        traffic = Traffic(members=64, zipf=0.5, rate=1.0, burst=4.0, seconds=800.0, storm=48, seed=seed)
        off, admission, two_phase = outcomes(traffic, setup, PUBLISHED).values()
        assert off.warm_p95 and admission.warm_p95 and two_phase.warm_p95
        assert off.warm_p95 > 2.0 * max(admission.warm_p95, two_phase.warm_p95)
        assert off.stalls > 2 * max(admission.stalls, two_phase.stalls)
        assert off.p95 and admission.p95 and two_phase.p95
        assert two_phase.p95 < 0.5 * min(off.p95, admission.p95)
        found.append((admission.warm_p95 - two_phase.warm_p95, admission.stalls - two_phase.stalls))
    assert statistics.fmean(p95 for p95, _ in found) > 0.0
    assert statistics.fmean(stalls for _, stalls in found) > 0.0


def test_a_new_revision_takes_no_request_before_it_is_loaded() -> None:
    traffic = Traffic(members=48, zipf=0.0, rate=4.0, seconds=200.0, storm=48)
    found = outcomes(traffic, Setup(slots=64, warm=128, settle=90.0), NATIVE)
    assert found[Mode.admission].cold > 0.04
    assert found[Mode.two_phase].cold == 0.0


def test_too_much_is_refused_and_what_is_let_in_does_not_wait_without_end() -> None:
    traffic = Traffic(members=4000, zipf=0.8, rate=60.0, seconds=40.0)
    found = outcomes(traffic, Setup(settle=0.0, waiting=64))
    assert found[Mode.admission].refused > 0.5 * found[Mode.admission].requests
    assert found[Mode.admission].p95 and found[Mode.off].p95
    assert found[Mode.admission].p95 < 15.0 < found[Mode.off].p95


@pytest.mark.parametrize("mode", Mode)
def test_every_request_is_counted_once(mode: Mode) -> None:
    traffic = Traffic(members=300, rate=8.0, seconds=60.0, storm=50, burst=4.0)
    setup = Setup(slots=4, warm=16, disk=64, running=8, waiting=20, settle=0.0)
    events = traffic.events()
    found = simulate(events, mode, setup=setup)
    assert found == simulate(events, mode, setup=setup)
    assert found.requests == sum(isinstance(e, Request) for e in events)
    assert found.hot + found.warm + found.disk + found.cold == pytest.approx(1.0)
    assert min(found.hot, found.warm, found.disk, found.cold, found.loads) > 0


def test_no_adapter_is_loaded_twice_while_all_fit() -> None:
    found = outcomes(Traffic(members=30, rate=4.0, seconds=120.0), Setup(warm=64, settle=0.0))
    assert {outcome.loads for outcome in found.values()} == {30}


def test_what_left_host_memory_left_its_slot() -> None:
    """With more slots than adapters in memory, and requests far apart: each is a load unless its adapter is warm."""
    events = [Request(10.0 * i, f"m{i % 5}") for i in range(100)]
    found = simulate(events, Mode.admission, setup=Setup(slots=8, warm=3, settle=0.0))
    assert 0 < found.loads == pytest.approx(100 * (found.disk + found.cold))


def test_an_engine_step_costs_more_when_adapters_interleave() -> None:
    setup = Setup(settle=0.0)
    grouped, mixed = (
        simulate(
            [Request(0.0, m) for m in members], Mode.admission, setup=setup, costs=dataclasses.replace(BULK, fill=0.0)
        )
        for members in ("aaaabbbb", "abcdefgh")
    )
    assert grouped.p95 and mixed.p95 and mixed.p95 > grouped.p95 + 2 * BULK.step


def test_popularity_follows_zipf() -> None:
    ranks = zipf(1000, 1.0, 100_000, seed=3)
    assert ranks.count(0) / ranks.count(9) == pytest.approx(10.0, rel=0.15)
    assert ranks == zipf(1000, 1.0, 100_000, seed=3)
    assert 0 <= min(ranks) <= max(ranks) < 1000


def test_bursts_come_beside_the_rate() -> None:
    times = [e.time for e in Traffic(rate=50.0, burst=5.0, seconds=200.0).events()]
    inside = sum(t % 20.0 < 4.0 for t in times)
    assert inside / 40.0 == pytest.approx(250.0, rel=0.1)
    assert (len(times) - inside) / 160.0 == pytest.approx(50.0, rel=0.1)


def test_a_storm_publishes_the_most_popular_at_half_time() -> None:
    [storm] = [e for e in Traffic(members=9, storm=3, seconds=10.0).events() if isinstance(e, Publish)]
    assert storm == Publish(5.0, ("m0", "m1", "m2"))


def test_a_log_is_read_in_order_of_time() -> None:
    found = read(["time,member", "2.5,population/b", "", "1,a  # first"])
    assert found == [Request(1.0, "a"), Request(2.5, "population/b")]


@pytest.mark.parametrize(
    ("row", "words"),
    [("1;a", "time,member"), ("1,", "time,member"), ("x,a", "seconds, found 'x'"), ("nan,a", "seconds, found 'nan'")],
)
def test_a_bad_row_is_named(row: str, words: str) -> None:
    with pytest.raises(BadTrace, match=f"row 2: expected .*{words}"):
        read(["1,a", row])


def test_a_replica_that_cannot_be_is_refused() -> None:
    for wrong in ({"slots": 0}, {"share": 0.0}, {"patience": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Setup(**wrong)
