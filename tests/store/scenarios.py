"""Work on a population in numbered steps, which a test kills at any write and finishes with another process.

What a step does follows from its number and the state of the catalogue before it, so an undisturbed run and one that
was killed and finished by others have the same facts in the end. Only `allele.store` is used. An operation of the
store is added with a function here and its name in a scenario.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from allele.protocol.commands import OptimizerSpec
from allele.store import (
    BaseRef,
    DataRange,
    Fact,
    FencedError,
    Index,
    PopulationRecord,
    PopulationStore,
    Provenance,
    StoreUnavailable,
    Versions,
    Writer,
)
from allele.store.collect import collect
from allele.store.facts import now
from allele.store.retention import Policy
from tests.store.history import Event, Kind, Recorder
from tests.store.proxy import Proxy, Rule

RUN = "run"
MEMBERS = tuple(f"m{i}" for i in range(5))
WRITES = ("PUT", "POST", "DELETE")


@dataclasses.dataclass
class Session:
    """What a driver has open."""

    store: PopulationStore
    writer: Writer
    index: Index


def open_store(url: str, environ: Mapping[str, str]) -> PopulationStore:
    return PopulationStore.open(url, namespace="team", population="users", environ=environ)


def claim(session: Session, step: int) -> None:
    session.store.claim(PopulationRecord(uid="uid", base_digest="sha256:base", shapes={"g": "shape"}))


def publish(session: Session, step: int) -> None:
    """New revisions of three members: segment, states, provenance, one commit."""
    members = random.Random(step).sample(MEMBERS, 3)
    weights = session.store.write_segments({m: content("weights", m, step) for m in members})
    states = session.store.write_segments({m: content("state", m, step) for m in members}, "states")
    sha = session.store.write_provenance(provenance(step))
    session.writer.commit(step, [_committed(session.index, m, weights[m], states[m], sha) for m in members])


def expose(session: Session, step: int) -> None:
    """The newest revision of every member, but where there is a hold."""
    newest = [session.index.newest(m) for m in MEMBERS if session.index.hold(m) is None]
    session.writer.commit(step, [Fact(kind="Exposed", member=f.member, revision=f.revision) for f in newest if f])


def roll_back(session: Session, step: int) -> None:
    """Hold the first revision of two members."""
    members = random.Random(step).sample(MEMBERS, 2)
    session.writer.commit(
        step,
        [
            Fact(kind="Held", member=m, revision=1, reason="test")
            for m in members
            if session.index.get(m, 1) and not session.index.is_retired(m, 1)
        ],
    )


def lift(session: Session, step: int) -> None:
    held = [m for m in MEMBERS if session.index.hold(m)]
    session.writer.commit(step, [Fact(kind="Held", member=m) for m in held])


def compact(session: Session, step: int) -> None:
    session.store.catalogue.compact()


AT_ONCE = Policy(keep_last=1, max_policy_lag=0, grace=timedelta(0), vacuum=timedelta(0))
"""Nothing waits, which is right where nobody else writes or reads."""


def gather(session: Session, step: int) -> None:
    """A pass of the collector: retires, drops states, compacts segments, deletes, vacuums."""
    collect(session.store, policy=AT_ONCE, now=now())


UNNUMBERED = (claim, compact, gather)
"""Operations that leave no step in the catalogue: done again when it is not known that they were done."""

Operation = Callable[[Session, int], None]

BEFORE: tuple[Operation, ...] = (claim, publish, publish, expose, publish, publish, publish)
"""What a population has behind it when its scenario starts."""

SCENARIOS: dict[str, tuple[Operation, ...]] = {
    "publish": (publish, publish),
    "expose": (publish, expose),
    "roll back": (roll_back, lift),
    "compact": (compact,),
    "collect": (gather, gather, gather),
}
LIFE: tuple[Operation, ...] = (
    publish, compact, expose, roll_back, publish, gather, expose, compact, publish, gather, lift, gather, publish
)  # fmt: skip
FRESH: tuple[Operation, ...] = (claim, publish, expose)
"""The first work on a population, which has nothing behind it."""


def some(seed: int) -> tuple[Operation, ...]:
    """A few operations in an order drawn by `seed`."""
    drawn = random.Random(seed)
    operations = (publish, expose, roll_back, lift, compact, gather)
    return tuple(drawn.choices(operations, (4, 2, 1, 1, 2, 2), k=drawn.randint(1, 7)))


def work(
    store: PopulationStore,
    operations: tuple[Operation, ...],
    *,
    first: int,
    done: Callable[[int], None] = lambda step: None,
) -> Session:
    """Do what is left of `operations`, numbered from `first`, as a new driver of the run."""
    writer = store.catalogue.start(RUN)
    done(first - 1)
    session = Session(store, writer, Index.load(store.catalogue))
    for step, operation in enumerate(operations, first):
        if writer.last_step is not None and writer.last_step >= step:
            continue
        operation(session, step)
        done(step)
        session.index.refresh()
    return session


@dataclasses.dataclass(frozen=True)
class Death:
    """SIGKILL at the `nth` write, before or after the server has done it."""

    nth: int
    after: bool

    def rule(self, path: str) -> Rule:
        action = "kill-after" if self.after else "kill"
        return Rule(action=action, path=path, methods=WRITES, nth=self.nth, pid=os.getpid())


def doomed(
    url: str,
    environ: Mapping[str, str],
    operations: tuple[Operation, ...],
    *,
    first: int,
    acknowledged: Connection,
    proxy: Proxy | None = None,
    death: Death | None = None,
) -> None:
    """`work` in a process of its own, to be killed by a rule of the proxy or from outside.

    Sends the number of the rule (0: none), then the steps that it knows to be done.
    """
    acknowledged.send(proxy.add(death.rule(path_of(url))) if proxy and death else 0)
    work(open_store(url, environ), operations, first=first, done=acknowledged.send)


def rival(proxy: Proxy, url: str, *, step: int, pipe: Connection) -> None:
    """A driver that has started, waits for a word, then publishes a step; says how that ended."""
    store = open_store(url, proxy.environ)
    session = Session(store, store.catalogue.start(RUN), Index.load(store.catalogue))
    pipe.send(session.writer.fence)
    pipe.recv()
    try:
        publish(session, step)
    except FencedError:
        pipe.send("fenced")
    else:
        pipe.send("committed")


def publisher(
    url: str,
    environ: Mapping[str, str],
    *,
    run: str,
    members: Sequence[str],
    steps: int,
    record: Path,
    idle: Sequence[str] = (),
) -> None:
    """A run of its own that publishes members of its own and records the history.

    Each new revision is exposed, but of the first member only the first one; `idle` ones get one revision, not exposed.
    """
    store, recorder = open_store(url, environ), Recorder(record)
    writer = store.catalogue.start(run)
    index = Index.load(store.catalogue)
    for step in range(1, 2 * steps + 1, 2):
        data = {m: content(run, m, step) for m in (*members, *(idle if step == 1 else ()))}
        ranges = store.write_segments(data)
        facts = [
            Fact.committed(member=m, revision=index.next_revision(m), weights=r, shape="s") for m, r in ranges.items()
        ]
        _insist(recorder, "commit", writer, step, facts)
        index.refresh()
        exposed = members if step == 1 else members[1:]
        exposures = [Fact(kind="Exposed", member=f.member, revision=f.revision) for f in facts if f.member in exposed]
        _insist(recorder, "expose", writer, step + 1, exposures)
        index.refresh()


def collector(proxy: Proxy, url: str, *, policy: Policy, death: Death) -> None:
    """One pass after the other, until it is killed at a write; a newer collector may fence it off in between."""
    store = open_store(url, proxy.environ)
    proxy.add(death.rule(path_of(url)))
    while True:
        with contextlib.suppress(StoreUnavailable, FencedError):
            collect(store, policy=policy, now=now())


def _insist(recorder: Recorder, kind: Kind, writer: Writer, step: int, facts: Sequence[Fact]) -> None:
    """Commit, again while the outcome is unknown, as the error says that one should."""
    events = [
        Event(kind=kind, member=f.member, revision=f.revision or 0, digest=f.digest or "", start=0.0) for f in facts
    ]
    with recorder.during(*events):
        for _ in range(3):
            with contextlib.suppress(StoreUnavailable):
                writer.commit(step, facts)
                return
        writer.commit(step, facts)


def path_of(url: str) -> str:
    """Expression for the requests of a store, objects and listings."""
    return url.removeprefix("s3://").partition("/")[2]


def content(kind: str, member: str, step: int) -> bytes:
    seed = f"{kind} {member} {step}"
    return random.Random(seed).randbytes(300 + 100 * step)


def provenance(step: int) -> Provenance:
    return Provenance(
        namespace="team",
        population="users",
        population_uid="uid",
        run=RUN,
        run_uid=RUN,
        fence=1,
        step=step,
        base=BaseRef(uri="bases/tiny", digest="sha256:base"),
        tokenizer_digest="t",
        shapes={},
        environment="e",
        reward="r",
        data=DataRange(cursor=step, prompts=1),
        versions=Versions(allele="0"),
        optimizer=OptimizerSpec(),
        loss={"kind": "GRPO"},
        time=datetime(2026, 1, 1, tzinfo=UTC),
    )


def _committed(index: Index, member: str, weights: object, states: object, sha: str) -> Fact:
    newest = index.newest(member)
    return Fact.committed(
        member=member,
        revision=index.next_revision(member),
        parent=newest.revision if newest else None,
        weights=weights,  # type: ignore[arg-type]
        state=states,  # type: ignore[arg-type]
        shape="shape",
        provenance=sha,
    )
