"""Kills the writer of a population at a chosen write, looks at what is left, and lets a successor finish.

The laboratory prepares a population once and copies its files for every kill, as a fresh one; the processes that die
are forked from one that has only imported what they need (no threads are running in it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from allele.protocol.errors import ProtocolError
from allele.store import Catalogue, Fact, FencedError, Index, PopulationStore, StoreError, Writer
from tests.store import scenarios
from tests.store.proxy import Proxy, Rule
from tests.store.scenarios import RUN, Death, Operation, work

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pandas", "pytest", "tests.store.conftest"])
"""pyarrow imports pandas with the first array, and a fork imports the main module again: seconds, each."""

Key = tuple[Any, ...]


def key(fact: Fact) -> Key:
    """What a fact says, without where its bytes are and when it was committed."""
    return (fact.kind, fact.member, fact.revision, fact.parent, fact.digest, fact.state_digest, fact.run, fact.step)


def told(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """What drivers said, each revision as it was first committed: collectors say some again, without a state or with
    another place, and how often depends on where they died."""
    said: dict[Key, Fact] = {}
    for i, fact in enumerate(sorted(facts, key=lambda f: f.order)):
        if fact.run == RUN:
            said.setdefault((fact.member, fact.revision) if fact.kind == "Committed" else (i,), fact)
    return tuple(said.values())


def retired(facts: Iterable[Fact]) -> frozenset[tuple[str, int | None]]:
    return frozenset((f.member, f.revision) for f in facts if f.kind == "Retired")


def heads(index: Index) -> dict[str, tuple[Key | None, ...]]:
    """What every member is now: newest, exposed, held."""
    answers = (index.newest, index.exposed, index.hold)
    return {m: tuple(key(f) if (f := answer(m)) else None for answer in answers) for m in sorted(index.members())}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A population before some operations, and what an undisturbed run of them did."""

    operations: tuple[Operation, ...]
    first: int
    facts: tuple[Fact, ...]
    """Of drivers, as `told` gives them."""
    retired: frozenset[tuple[str, int | None]]
    heads: dict[str, tuple[Key | None, ...]]
    origin: str = ""
    """Url of the population before; empty when there is nothing before."""
    writes: int = 0
    requests: tuple[str, ...] = ()
    """Method and path of each request of the operations, without the part that names the store."""

    def at(self, step: int) -> Counter[Key]:
        """Facts of all steps up to one."""
        return Counter(key(f) for f in self.facts if f.step is not None and f.step <= step)


def observe(store: PopulationStore, operations: tuple[Operation, ...], *, first: int) -> Prepared:
    """What an undisturbed run, which is over, has left."""
    facts = list(store.catalogue.facts())
    return Prepared(operations, first, told(facts), retired(facts), heads(Index.load(store.catalogue)))


class Laboratory:
    def __init__(self, environ: dict[str, str], root: Path, proxy: Proxy, *, bucket: str) -> None:
        self._environ = environ
        self._root = root
        """Folder of the server with `data` and `sidecar`."""
        self._proxy = proxy
        self._bucket = bucket

    def prepare(self, operations: tuple[Operation, ...], *, before: tuple[Operation, ...]) -> Prepared:
        origin = ""
        if before:
            origin = self._fresh("")
            work(self.open(origin), before, first=1)
        url, first = self._fresh(origin), len(before) + 1
        with self._proxy.rule(Rule(action="pass", path=scenarios.path_of(url), methods=scenarios.WRITES)) as number:
            work(scenarios.open_store(url, self._proxy.environ), operations, first=first)
            writes, _ = self._proxy.count(number)
        requests = tuple(f"{m} {where}" for m, where, _ in self._proxy.log(scenarios.path_of(url)))
        done = observe(self.open(url), operations, first=first)
        return dataclasses.replace(done, origin=origin, writes=writes, requests=requests)

    def kill(self, prepared: Prepared, deaths: Sequence[Death]) -> bool:
        """Kill a run, and the ones that go on after it, then finish; whether all of them died.

        Raises AssertionError for anything that must not be: see `check_rest` and `check_end`.
        """
        url = self.fresh(prepared)
        try:
            newest, died = 0, []
            for death in deaths:
                exitcode, acknowledged = self._die(url, prepared, death)
                newest = check_rest(self.open(url), prepared, [newest, *acknowledged])
                died.append(exitcode != 0)
            check_end(self.open(url), prepared)
        finally:
            self.forget(url)
        return all(died)

    def disturb(self, prepared: Prepared, rule: Rule) -> StoreError | ProtocolError | None:
        """Let the operations meet a fault, then finish; returns the error that they ended with.

        Raises AssertionError as `kill` does, and whatever has no type of ours.
        """
        url = self.fresh(prepared)
        acknowledged: list[int] = []
        outcome: StoreError | ProtocolError | None = None
        try:
            with self._proxy.rule(dataclasses.replace(rule, path=scenarios.path_of(url) + rule.path)) as number:
                try:
                    store = scenarios.open_store(url, self._proxy.environ)
                    work(store, prepared.operations, first=prepared.first, done=acknowledged.append)
                except (StoreError, ProtocolError) as e:
                    outcome = e
                assert self._proxy.count(number)[1], f"{rule} hit nothing"
            check_rest(self.open(url), prepared, acknowledged)
            check_end(self.open(url), prepared)
        finally:
            self.forget(url)
        return outcome

    def _die(self, url: str, prepared: Prepared, death: Death) -> tuple[int, list[int]]:
        """Exit code of one process, and the steps that it knew to be done."""
        receiver, sender = FORKS.Pipe(duplex=False)
        process = FORKS.Process(
            target=scenarios.doomed,
            args=(url, self._proxy.environ, prepared.operations),
            kwargs={"first": prepared.first, "acknowledged": sender, "proxy": self._proxy, "death": death},
        )
        process.start()
        sender.close()
        process.join(60)
        rule, *acknowledged = drain(receiver)
        self._proxy.remove(rule)
        assert process.exitcode in (0, -signal.SIGKILL), f"{url}: exit code {process.exitcode}"
        return process.exitcode, acknowledged

    def open(self, url: str) -> PopulationStore:
        return scenarios.open_store(url, self._environ)

    def fresh(self, prepared: Prepared) -> str:
        """Url of a copy of the population as it was before the operations."""
        return self._fresh(prepared.origin)

    def fresh_url(self) -> str:
        """Url of an empty store."""
        return self._fresh("")

    def _fresh(self, origin: str) -> str:
        """A copy of a population, made behind the server's back."""
        name = uuid.uuid4().hex
        for part in ("data", "sidecar") if origin else ():
            folder = self._root / part / self._bucket
            shutil.copytree(folder / scenarios.path_of(origin), folder / name)
        return f"s3://{self._bucket}/{name}"

    def forget(self, url: str) -> None:
        for part in ("data", "sidecar"):
            shutil.rmtree(self._root / part / self._bucket / scenarios.path_of(url), ignore_errors=True)


def check_rest(store: PopulationStore, prepared: Prepared, acknowledged: Iterable[int]) -> int:
    """After a death: whole steps only, all that was acknowledged, at most the one in work beyond; all bytes there.

    Returns the newest committed step.
    """
    table = store.catalogue.snapshot()
    newest = (table.transaction_version(f"run/{RUN}") or 0) if table is not None else 0
    found = Counter(key(f) for f in told(store.catalogue.facts()))
    assert found == prepared.at(newest), (
        f"not whole steps: {found - prepared.at(newest)}, {prepared.at(newest) - found}"
    )
    numbered = [s for s, o in enumerate(prepared.operations, prepared.first) if o not in scenarios.UNNUMBERED]
    done = max(acknowledged, default=0)
    committed = max((s for s in numbered if s <= done), default=0)
    following = min((s for s in numbered if s > done), default=newest)
    assert committed <= newest <= following, f"step {newest} is committed, {committed} was acknowledged"
    check_bytes(store)
    return newest


def check_end(store: PopulationStore, prepared: Prepared) -> None:
    """A successor finishes, and everything is as after the undisturbed run; the one before it is fenced off."""
    table = store.catalogue.snapshot(create=True)
    assert table is not None
    fence = table.transaction_version(f"fence/{RUN}") or 0
    stale = Writer(Catalogue.open(store.objects), run=RUN, fence=fence, last_step=None)
    session = work(store, prepared.operations, first=prepared.first)
    assert session.writer.fence > fence
    with contextlib.suppress(FencedError):
        stale.commit(1_000, [Fact(kind="Exposed", member=scenarios.MEMBERS[0], revision=1)])
        raise AssertionError(f"a writer with fence {fence} could commit after {session.writer.fence}")
    facts = list(store.catalogue.facts())
    found, expected = Counter(key(f) for f in told(facts)), Counter(key(f) for f in prepared.facts)
    assert found == expected, f"too much: {found - expected}, lost: {expected - found}"
    assert retired(facts) == prepared.retired
    digests = {(f.member, f.revision, f.digest) for f in facts if f.kind == "Committed"}
    revisions = Counter((member, revision) for member, revision, _ in digests)
    assert not revisions or max(revisions.values()) == 1, f"a revision was used twice: {revisions}"
    assert heads(Index.load(store.catalogue)) == prepared.heads
    assert heads(session.index) == prepared.heads, "the index of the successor differs from a fresh one"
    check_bytes(store)


def check_bytes(store: PopulationStore) -> None:
    """Raises for a revision, not retired, whose bytes, state or provenance are not those of its digest."""
    index = Index.load(store.catalogue)
    facts = [index.get(m, r) for m in index.members() for r in range(1, index.next_revision(m))]
    committed = [f for f in facts if f is not None]
    live = [f for f in committed if not index.is_retired(f.member, f.revision or 0)]
    store.read_many([r for f in live for r in (f.weights, f.state) if r is not None])
    for sha in {f.provenance for f in committed if f.provenance}:
        store.read_provenance(sha)


def drain(receiver: Connection) -> list[int]:
    received = []
    with contextlib.suppress(EOFError):
        while True:
            received.append(receiver.recv())
    return received
