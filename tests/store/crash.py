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

from allele.store import Catalogue, Fact, FencedError, Index, PopulationStore, Writer
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


def heads(index: Index) -> dict[str, tuple[Key | None, ...]]:
    """What every member is now: newest, exposed, held."""
    answers = (index.newest, index.exposed, index.hold)
    return {m: tuple(key(f) if (f := answer(m)) else None for answer in answers) for m in sorted(index.members())}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A population before some operations, and what an undisturbed run of them did."""

    origin: str
    """Url of the population before; empty when there is nothing before."""
    operations: tuple[Operation, ...]
    first: int
    facts: tuple[Fact, ...]
    heads: dict[str, tuple[Key | None, ...]]
    writes: int

    def at(self, step: int) -> Counter[Key]:
        """Facts of all steps up to one."""
        return Counter(key(f) for f in self.facts if f.step is not None and f.step <= step)


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
            work(self._open(origin), before, first=1)
        url, first = self._fresh(origin), len(before) + 1
        with self._proxy.rule(Rule(action="pass", path=scenarios.path_of(url), methods=scenarios.WRITES)) as number:
            work(scenarios.open_store(url, self._proxy.environ), operations, first=first)
            writes, _ = self._proxy.count(number)
        store = self._open(url)
        return Prepared(
            origin, operations, first, tuple(store.catalogue.facts()), heads(Index.load(store.catalogue)), writes
        )

    def kill(self, prepared: Prepared, deaths: Sequence[Death]) -> bool:
        """Kill a run, and the ones that go on after it, then finish; whether all of them died.

        Raises AssertionError for anything that must not be: see `check_rest` and `check_end`.
        """
        url = self._fresh(prepared.origin)
        try:
            died = [self._kill_once(url, prepared, death) for death in deaths]
            check_end(self._open(url), prepared)
        finally:
            self._forget(url)
        return all(died)

    def _kill_once(self, url: str, prepared: Prepared, death: Death) -> bool:
        receiver, sender = FORKS.Pipe(duplex=False)
        process = FORKS.Process(
            target=scenarios.doomed,
            args=(self._proxy, url, prepared.operations),
            kwargs={"first": prepared.first, "death": death, "acknowledged": sender},
        )
        process.start()
        sender.close()
        process.join(60)
        rule, *acknowledged = _drain(receiver)
        self._proxy.remove(rule)
        assert process.exitcode in (0, -signal.SIGKILL), f"{url}: exit code {process.exitcode}"
        check_rest(self._open(url), prepared, acknowledged)
        return process.exitcode != 0

    def _open(self, url: str) -> PopulationStore:
        return scenarios.open_store(url, self._environ)

    def _fresh(self, origin: str) -> str:
        """A copy of a population, made behind the server's back."""
        name = uuid.uuid4().hex
        for part in ("data", "sidecar") if origin else ():
            folder = self._root / part / self._bucket
            shutil.copytree(folder / scenarios.path_of(origin), folder / name)
        return f"s3://{self._bucket}/{name}"

    def _forget(self, url: str) -> None:
        for part in ("data", "sidecar"):
            shutil.rmtree(self._root / part / self._bucket / scenarios.path_of(url), ignore_errors=True)


def check_rest(store: PopulationStore, prepared: Prepared, acknowledged: Iterable[int]) -> None:
    """After a death: whole steps only, all that was acknowledged, at most the one in work beyond; all bytes there."""
    table = store.catalogue.snapshot()
    newest = (table.transaction_version(f"run/{RUN}") or 0) if table is not None else 0
    found = Counter(key(f) for f in store.catalogue.facts())
    assert found == prepared.at(newest), f"not whole steps: {found - prepared.at(newest)}, {prepared.at(newest) - found}"
    numbered = [s for s, o in enumerate(prepared.operations, prepared.first) if o not in scenarios.UNNUMBERED]
    done = max(acknowledged, default=0)
    committed = max((s for s in numbered if s <= done), default=0)
    following = min((s for s in numbered if s > done), default=newest)
    assert committed <= newest <= following, f"step {newest} is committed, {committed} was acknowledged"
    check_bytes(store)


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
    found, expected = Counter(key(f) for f in facts), Counter(key(f) for f in prepared.facts)
    assert found == expected, f"too much: {found - expected}, lost: {expected - found}"
    revisions = Counter((f.member, f.revision) for f in facts if f.kind == "Committed")
    assert not revisions or max(revisions.values()) == 1, f"a revision was used twice: {revisions}"
    assert heads(Index.load(store.catalogue)) == prepared.heads
    assert heads(session.index) == prepared.heads, "the index of the successor differs from a fresh one"
    check_bytes(store)


def check_bytes(store: PopulationStore) -> None:
    """Raises for a committed revision whose bytes, state or provenance are not those of its digest."""
    committed = [f for f in store.catalogue.facts() if f.kind == "Committed"]
    store.read_many([r for f in committed for r in (f.weights, f.state) if r is not None])
    for sha in {f.provenance for f in committed if f.provenance}:
        store.read_provenance(sha)


def _drain(receiver: Connection) -> list[int]:
    received = []
    with contextlib.suppress(EOFError):
        while True:
            received.append(receiver.recv())
    return received
