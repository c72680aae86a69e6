"""Work of several runs is neither lost nor reordered, and each run gets its part of every micro-batch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.protocol.commands import Mode
from allele_trainer.server.shares import Shares, Unit

MOST = 100
sizes = st.lists(st.integers(1, 130), min_size=1, max_size=25)
runs = st.dictionaries(st.sampled_from("abcde"), sizes, min_size=1)


def units_of(run: str, tokens: list[int], members: int = 2) -> list[Unit[int]]:
    return [Unit((run, i % members), run in "ab", n, i) for i, n in enumerate(tokens)]


def drained(shares: Shares[int]) -> list[list[tuple[str, Unit[int]]]]:
    found = []
    while batch := shares.next():
        found.append(batch)
    return found


@given(runs, st.integers(1, 6), st.sets(st.sampled_from("abcde")), st.sets(st.sampled_from("abcde")))
@settings(deadline=None)
def test_every_unit_runs_once_in_its_runs_order_within_the_limits(
    found: dict[str, list[int]], most_members: int, single: set[str], alone: set[str]
) -> None:
    shares: Shares[int] = Shares(max_tokens=MOST, max_members=most_members)
    for run, tokens in found.items():
        shares.add(run, units_of(run, tokens), mode="OneByOne" if run in single else "Batched", alone=run in alone)
    batches = drained(shares)
    for run, tokens in found.items():
        assert [u.work for b in batches for r, u in b if r == run] == list(range(len(tokens)))
    for batch in batches:
        members = [u.member for _, u in batch]
        assert len(set(members)) == len(members)
        assert all(sum(u.bank == bank for _, u in batch) <= most_members for bank in (True, False))
        assert sum(u.tokens for _, u in batch) <= MOST or len(batch) == 1
        present = {r for r, _ in batch}
        assert len(batch) == 1 or not present & single
        assert len(present) == 1 or not present & alone
    assert not shares


@given(st.lists(st.integers(1, MOST), min_size=10, max_size=20), st.integers(4, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_a_run_with_work_gets_as_much_as_those_with_endless_work(tokens: list[int], other: int, others: int) -> None:
    shares: Shares[int] = Shares(max_tokens=MOST, max_members=1000)
    for name in "bcde"[:others]:
        shares.add(name, units_of(name, [other] * 1000, members=1000))
    for _ in range(5):
        shares.next()
    shares.add("a", units_of("a", tokens, members=20))
    got = dict.fromkeys("abcde"[: others + 1], 0)
    while got["a"] < sum(tokens):
        for run, unit in shares.next():
            got[run] += unit.tokens
        # behind by what the others filled up with when its own unit did not fit
        assert got["a"] == sum(tokens) or got["a"] >= min(n for r, n in got.items() if r != "a") - MOST


@pytest.mark.parametrize("single", ["", "c", "bc"])
@pytest.mark.parametrize("alone", ["", "c"])
def test_runs_take_turns_with_units_that_fill_a_micro_batch(single: str, alone: str) -> None:
    shares: Shares[int] = Shares(max_tokens=MOST, max_members=1000)
    for name in "abc":
        mode: Mode = "OneByOne" if name in single else "Batched"
        shares.add(name, units_of(name, [MOST] * 4), mode=mode, alone=name in alone)
    order = [batch[0][0] for batch in drained(shares)]
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))


def test_small_units_of_every_run_are_in_every_micro_batch() -> None:
    shares: Shares[int] = Shares(max_tokens=MOST, max_members=1000)
    for name in "abcd":
        shares.add(name, units_of(name, [5] * 60, members=60))
    for _ in range(10):
        batch = shares.next()
        parts = [sum(u.tokens for r, u in batch if r == name) for name in "abcd"]
        assert min(parts) >= MOST / 4 - 5 and sum(parts) == MOST
