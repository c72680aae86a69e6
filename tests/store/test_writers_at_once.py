"""Drivers at the same time: of one run only the newest commits, of different runs nobody loses anything."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from allele.store import Fact, Index, ObjectNotFound, PopulationStore, StoreUnavailable
from allele.store.retention import Policy
from tests.store import scenarios
from tests.store.crash import FORKS, Laboratory, Prepared, check_bytes
from tests.store.history import Event, Recorder, load, violations
from tests.store.proxy import Action, Proxy, Rule
from tests.store.scenarios import BEFORE, RUN, WRITES, Death, Session, publish

ROUNDS = 100
RUNS = 16
GRACE = timedelta(seconds=6)
"""Longer than a publisher needs from its segment to its commit."""


def freeze_and_succeed(laboratory: Laboratory, proxy: Proxy, prepared: Prepared, freeze: Rule) -> tuple[str, bool]:
    """One round: the old driver freezes at a request, a new one commits the same step, the old one wakes.

    Returns how it ended for the old one, and whether its step was in before the new one started.
    """
    url, step = laboratory.fresh(prepared), prepared.first
    pipe, end = FORKS.Pipe()
    old = FORKS.Process(target=scenarios.rival, args=(proxy, url), kwargs={"step": step, "pipe": end})
    old.start()
    end.close()
    fence: int = pipe.recv()
    rule = proxy.add(dataclasses.replace(freeze, path=scenarios.path_of(url), pid=old.pid or 0))
    pipe.send("go")
    wait_until(lambda: proxy.count(rule)[1] > 0)
    store = laboratory.open(url)
    successor = Session(store, store.catalogue.start(RUN), Index.load(store.catalogue))
    was_in = successor.writer.last_step == step
    if not was_in:
        publish(successor, step)
    proxy.remove(rule)
    if freeze.action == "stop":
        os.kill(old.pid or 0, signal.SIGCONT)
    outcome: str = pipe.recv()
    old.join()
    facts = [f for f in store.catalogue.facts() if f.step == step]
    assert {f.fence for f in facts} == {fence if was_in else successor.writer.fence}, "who committed the step"
    assert len(facts) == 3
    check_bytes(store)
    laboratory.forget(url)
    return outcome, was_in


def test_a_frozen_driver_that_wakes_after_its_successor_committed_is_refused(
    laboratory: Laboratory, proxy: Proxy
) -> None:
    prepared = laboratory.prepare((publish,), before=BEFORE)
    actions: tuple[Action, ...] = ("hold", "stop")
    at_write = [Rule(action=a, methods=WRITES, nth=n) for n in range(1, prepared.writes) for a in actions]
    at_read = [Rule(action=a, methods=("GET",), nth=n) for n in range(1, 5) for a in actions]
    rounds = random.Random(1).choices([*at_write, *at_read], k=ROUNDS)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda rule: freeze_and_succeed(laboratory, proxy, prepared, rule), rounds))
    wrong = [(r, o) for r, o in zip(rounds, outcomes, strict=True) if o[0] != ("committed" if o[1] else "fenced")]
    assert wrong == []
    assert sum(was_in for _, was_in in outcomes) < ROUNDS / 4, "most rounds freeze before the commit"


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_concurrent_publishers_lose_nothing_and_readers_see_only_what_was_committed(
    laboratory: Laboratory, proxy: Proxy, tmp_path: Path, kind: str
) -> None:
    """Over the server, some requests fail and some replies are lost all the time."""
    steps, url = 2, laboratory.fresh_url() if kind == "s3" else f"file://{tmp_path}/store"
    names = {f"run-{run}": [f"r{run}-{i}" for i in range(2)] for run in range(RUNS)}
    bad_days = [
        Rule(action="answer", status=503, path=scenarios.path_of(url), times=0, share=0.02, seed=1),
        Rule(action="lose-reply", path=scenarios.path_of(url), times=0, share=0.02, seed=2),
    ]
    numbers = [proxy.add(rule) for rule in bad_days]
    history = tmp_path / "history"
    history.mkdir()
    publishers = [
        FORKS.Process(
            target=scenarios.publisher,
            args=(url, proxy.environ),
            kwargs={"run": run, "members": members, "steps": steps, "record": history / run},
        )
        for run, members in names.items()
    ]
    for publisher in publishers:
        publisher.start()
    store = laboratory.open(url)
    read_while(lambda: any(p.is_alive() for p in publishers), store, Recorder(history / "reader"))
    assert [p.exitcode for p in publishers] == [0] * RUNS
    hits = [proxy.remove(number)[1] for number in numbers]
    assert kind == "file" or min(hits) > 0
    found = sorted((f.member, f.revision) for f in store.catalogue.facts() if f.kind == "Committed")
    assert found == sorted((m, r) for members in names.values() for m in members for r in range(1, steps + 1))
    check_bytes(store)
    events = load(history)
    assert {e.kind for e in events} == {"commit", "expose", "read"}
    assert any(e.as_exposed for e in events)
    assert violations(events) == []


def test_collectors_that_die_beside_publishers_take_nothing_that_is_needed(
    laboratory: Laboratory, proxy: Proxy, tmp_path: Path
) -> None:
    """Two collectors at a time, each killed at some write, until bytes are gone; publishers and a reader go on."""
    url, history = laboratory.fresh_url(), tmp_path / "history"
    history.mkdir()
    policy = Policy(keep_last=1, max_policy_lag=0, grace=GRACE, vacuum=GRACE)
    publishers = [
        FORKS.Process(
            target=scenarios.publisher,
            args=(url, proxy.environ),
            kwargs={
                "run": run,
                "members": [f"{run}-0", f"{run}-1"],
                "idle": [f"{run}-idle"],
                "steps": 10_000,
                "record": history / run,
            },
        )
        for run in ("r1", "r2")
    ]
    store, drawn = laboratory.open(url), random.Random(5)
    collectors: list[BaseProcess] = []

    def going() -> bool:
        """Whether there is more to see; keeps two collectors at work."""
        if sum(c.is_alive() for c in collectors) < 2:
            death = Death(drawn.randint(1, 12), drawn.random() < 0.5)
            kwargs = {"policy": policy, "death": death}
            collectors.append(FORKS.Process(target=scenarios.collector, args=(proxy, url), kwargs=kwargs))
            collectors[-1].start()
        return len(collectors) < 12 or not gone(store)

    for publisher in publishers:
        publisher.start()
    read_while(going, store, Recorder(history / "reader"))
    for process in (*publishers, *collectors):
        process.kill()
        process.join()
    assert {p.exitcode for p in (*publishers, *collectors)} == {-signal.SIGKILL}, "none of them failed"
    clock = time.monotonic() - time.time()
    retired = [_retired(f, clock) for f in store.catalogue.facts() if f.kind == "Retired"]
    events = [*load(history), *retired]
    assert {e.kind for e in events} == {"commit", "expose", "read", "collect"}
    assert violations(events) == []
    check_bytes(store)


def gone(store: PopulationStore) -> set[str | None]:
    """Segments of revisions that are there no longer."""
    there = {o.path for o in store.objects.list("segments")}
    return {f.segment for f in store.catalogue.facts() if f.kind == "Committed"} - there


def _retired(fact: Fact, clock: float) -> Event:
    assert fact.time is not None and fact.revision is not None
    at = fact.time.timestamp() + clock
    return Event(kind="collect", member=fact.member, revision=fact.revision, start=at, end=at)


def read_while(going: Callable[[], bool], store: PopulationStore, recorder: Recorder) -> None:
    """Reads the newest and the exposed revision of members in turn, and records what it was given."""
    index = Index.load(store.catalogue)
    drawn = random.Random(3)
    while going():
        begun = time.monotonic()
        with contextlib.suppress(StoreUnavailable):
            index.refresh()
        members = sorted(index.members())
        for member in drawn.sample(members, min(4, len(members))):
            for fact, as_exposed in ((index.newest(member), False), (index.exposed(member), True)):
                if fact is not None and fact.weights is not None:
                    recorder.write(_read(store, fact, begun, as_exposed))


def _read(store: PopulationStore, fact: Fact, begun: float, as_exposed: bool) -> Event:
    assert fact.weights is not None and fact.revision is not None
    try:
        digest = hashlib.sha256(store.read(fact.weights)).hexdigest()
    except ObjectNotFound:
        digest = ""
    return Event(
        kind="read",
        member=fact.member,
        revision=fact.revision,
        start=begun,
        end=time.monotonic(),
        digest=digest,
        as_exposed=as_exposed,
    )


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        if time.monotonic() > deadline:
            pytest.fail("not met within a minute")
        time.sleep(0.01)
