"""Whatever the network and the store's answers do, an operation succeeds after retries or says by type that it did not,
and never is a commit lost, doubled or half visible.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from allele.protocol.errors import DigestMismatch
from allele.store import Fact, StoreUnavailable
from tests.store import scenarios
from tests.store.crash import Laboratory, Prepared
from tests.store.proxy import Action, Proxy, Rule
from tests.store.scenarios import BEFORE, FRESH, Operation, compact, expose, publish

AT_ONCE = 8
"""Disturbed runs; most of one is waiting before a retry."""

LOG_ENTRY = r".*/_delta_log/\d{20}\.json$"

WRITE_FAULTS = [
    Rule(action="answer", status=409),
    Rule(action="answer", status=412),
    Rule(action="answer", status=429),
    Rule(action="answer", status=503),
    Rule(action="answer-after", status=409),
    Rule(action="answer-after", status=412),
    Rule(action="answer-after", status=503),
    Rule(action="reset"),
    Rule(action="lose-reply"),
    Rule(action="delay", seconds=0.3),
]
READ_FAULTS = [
    Rule(action="answer", status=429),
    Rule(action="answer", status=503),
    Rule(action="reset"),
    Rule(action="reset-reply"),
    Rule(action="truncate"),
    Rule(action="delay", seconds=0.3),
]
BURSTS = [Rule(action="answer", status=status, times=3) for status in (429, 503)]


def name(rule: Rule) -> str:
    times = f" {rule.times} times" if rule.times > 1 else ""
    return rule.action + (f" {rule.status}" if "answer" in rule.action else "") + times


@pytest.fixture(scope="module")
def expose_once(laboratory: Laboratory) -> Prepared:
    return laboratory.prepare((expose,), before=BEFORE)


@pytest.mark.parametrize("fault", [*WRITE_FAULTS, *BURSTS], ids=name)
def test_a_commit_is_done_once_whatever_its_log_entry_meets(
    laboratory: Laboratory, expose_once: Prepared, fault: Rule
) -> None:
    """The first log entry is that of the start, the second that of the commit."""
    for nth in (1, 2):
        rule = dataclasses.replace(fault, path=LOG_ENTRY, methods=("PUT",), nth=nth)
        assert laboratory.disturb(expose_once, rule) is None, "expected success after retries"


@pytest.mark.parametrize("action", ["truncate", "reset-reply"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_commit_looks_again_when_the_log_cannot_be_listed(
    laboratory: Laboratory, expose_once: Prepared, proxy: Proxy, action: Action, nth: int
) -> None:
    """The libraries do not ask again for a listing that breaks off."""
    url = laboratory.fresh(expose_once)
    store = scenarios.open_store(url, proxy.environ)
    writer, before = store.catalogue.start(scenarios.RUN), len(store.catalogue.facts())
    with proxy.rule(Rule(action=action, path=scenarios.path_of(url) + ".*&start-after", nth=nth)) as number:
        writer.commit(expose_once.first, [Fact(kind="Exposed", member="m0", revision=1)])
        assert proxy.count(number)[1] == 1
    assert len(store.catalogue.facts()) == before + 1


@pytest.mark.parametrize(
    ("operations", "before"),
    [((publish,), BEFORE), ((compact,), BEFORE), (FRESH, ())],
    ids=["publish", "compact", "first work"],
)
def test_each_request_meets_faults(
    laboratory: Laboratory, operations: tuple[Operation, ...], before: tuple[Operation, ...]
) -> None:
    """Every write meets two faults, every sixth read one, in turn."""
    prepared = laboratory.prepare(operations, before=before)
    faults = itertools.cycle(WRITE_FAULTS)
    rules = [
        dataclasses.replace(next(faults), methods=scenarios.WRITES, nth=nth)
        for nth in range(1, prepared.writes + 1)
        for _ in range(2)
    ]
    faults = itertools.cycle(READ_FAULTS)
    reads = sum(not request.startswith(scenarios.WRITES) for request in prepared.requests)
    rules += [  # how many reads there are varies, as delta-rs reads ahead
        dataclasses.replace(next(faults), methods=("GET", "HEAD"), nth=nth) for nth in range(1, reads * 3 // 4, 6)
    ]
    disturb_all(laboratory, prepared, rules)


def test_a_store_that_answers_badly_all_the_time(laboratory: Laboratory) -> None:
    prepared = laboratory.prepare((publish, expose, compact), before=BEFORE)
    faults = [*WRITE_FAULTS, *READ_FAULTS]
    disturb_all(laboratory, prepared, [dataclasses.replace(f, times=0, share=0.2, seed=1) for f in faults])


def disturb_all(laboratory: Laboratory, prepared: Prepared, rules: list[Rule]) -> None:
    """Each in a population of its own; errors of ours are fine, other errors and broken populations are not."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = [(rule, pool.submit(laboratory.disturb, prepared, rule)) for rule in rules]
    failed = [(rule, e) for rule, o in outcomes if (e := o.exception())]
    assert not failed, f"{len(failed)} of {len(outcomes)}: " + "\n".join(f"{r}: {e!r}" for r, e in failed)


def test_damaged_bytes_are_refused_by_their_digest(laboratory: Laboratory, proxy: Proxy) -> None:
    prepared = laboratory.prepare((publish,), before=BEFORE)
    store = scenarios.open_store(laboratory.fresh(prepared), proxy.environ)
    for fact in store.catalogue.facts():
        if fact.kind != "Committed":
            continue
        weights, state, sha = fact.weights, fact.state, fact.provenance
        assert weights and state and sha
        reads: list[tuple[str, Callable[[], object]]] = [
            (weights.path, functools.partial(store.read, weights)),
            (state.path, functools.partial(store.read_many, [state])),
            (sha, functools.partial(store.read_provenance, sha)),
        ]
        for path, read in reads:
            with proxy.rule(Rule(action="flip", path=path)), pytest.raises(DigestMismatch, match="expected sha256"):
                read()
            read()


def test_damaged_files_of_facts_give_no_wrong_fact(laboratory: Laboratory, proxy: Proxy) -> None:
    """Parquet has no checksum of its footer: the files' names have one of all bytes."""
    prepared = laboratory.prepare((publish,), before=BEFORE)
    store = scenarios.open_store(laboratory.fresh(prepared), proxy.environ)
    facts = list(store.catalogue.facts())
    for percent in range(0, 100, 2):
        rule = Rule(action="flip", path=scenarios.path_of(store.objects.url()) + r".*\.parquet$", at=percent / 100)
        with proxy.rule(rule), pytest.raises(StoreUnavailable, match="expected a whole parquet file of facts"):
            store.catalogue.facts()
    assert list(store.catalogue.facts()) == facts
