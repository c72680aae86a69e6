"""Collection: carries out what retention plans, beside drivers that commit.

The order survives SIGKILL anywhere: Retired facts and Committed facts without state → copies of what is live in sparse
objects → Committed facts with the new places → deletion of what no fact needed for a grace period, judged by the
catalogue as it is then. What a crash leaves behind is garbage, which the next pass finds; a repeated pass converges.
Of two collectors the fence stops the older one at its next commit; what both delete is the same.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from itertools import groupby

from ulid import ULID

from allele.protocol.commands import ByteRange
from allele.protocol.errors import DigestMismatch
from allele.store import delta
from allele.store.catalogue import FOLDER, Catalogue
from allele.store.errors import ObjectNotFound
from allele.store.facts import Fact
from allele.store.population import SEGMENT_BYTES, PopulationStore, chunks, portions
from allele.store.retention import FOLDERS, Compact, Delete, Plan, Policy, plan
from allele.store.writer import Writer

RUN = "gc"
"""Under which collectors commit; runs have uids of Kubernetes, which look otherwise."""

_CHUNK_BYTES = 32 << 20
_CHUNKS_AHEAD = 2
_FACTS_PER_COMMIT = 100_000
_DELETE_THREADS = 8

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a pass did."""

    plan: Plan
    damaged: tuple[str, ...] = ()
    """Sparse objects that stay as they are, each with the reason: their bytes are not those recorded."""


def survey(store: PopulationStore, *, policy: Policy, now: datetime) -> Plan:
    """What `collect` would do; changes nothing."""
    objects = [o for folder in FOLDERS for o in store.objects.list(folder)]
    unnamed = vacuumable(store.catalogue, policy=policy, now=now)
    made = plan(store.catalogue.table(), objects, policy=policy, now=now)
    return dataclasses.replace(made, delete=(*made.delete, *unnamed))


def vacuumable(catalogue: Catalogue, *, policy: Policy, now: datetime) -> list[Delete]:
    """Parquet files that the newest version does not name; the log, and what else lies in folders, is not looked at."""
    files = [o for o in catalogue.objects.list() if o.path.endswith(".parquet") and "/" not in o.path]
    table = catalogue.snapshot()
    if table is None:
        return []
    live = {f.path for f in delta.live_files(table)}
    age = max(policy.grace, policy.vacuum)
    reason = f"the catalogue does not name it, older than {age}"
    return [
        Delete(f"{FOLDER}/{o.path}", o.size, reason) for o in files if o.path not in live and now - o.modified >= age
    ]


def collect(store: PopulationStore, *, policy: Policy, now: datetime, progress: Progress = silent) -> Collected:
    """One pass. Raises FencedError when another collector has started; the store is then as whole as before."""
    first = survey(store, policy=policy, now=now)
    facts, compact = first.facts(), first.compact
    damaged: list[str] = []
    if facts or compact:
        writer = store.catalogue.start(RUN)
        _commit(writer, facts, progress)
        if facts:
            compact = survey(store, policy=policy, now=now).compact
        damaged = _Compaction(store, writer, progress).run(compact)
    progress("delete", 0, len(first.delete))
    delete = survey(store, policy=policy, now=now).delete
    _delete(store, delete, progress)
    store.catalogue.write_heads()
    return Collected(dataclasses.replace(first, compact=compact, delete=delete), tuple(damaged))


def _commit(writer: Writer, facts: Sequence[Fact], progress: Progress) -> None:
    for start in range(0, len(facts), _FACTS_PER_COMMIT):
        part = facts[start : start + _FACTS_PER_COMMIT]
        writer.commit((writer.last_step or 0) + 1, part)
        progress("commit", start + len(part), len(facts))


def _delete(store: PopulationStore, objects: Sequence[Delete], progress: Progress) -> None:
    with ThreadPoolExecutor(_DELETE_THREADS) as pool:
        gone = pool.map(lambda o: store.objects.delete([o.path]), objects)
        for i, _ in enumerate(gone, start=1):
            progress("delete", i, len(objects))


class _Compaction:
    """Copies what is live in sparse objects into new ones and commits the new places, one new object at a time."""

    def __init__(self, store: PopulationStore, writer: Writer, progress: Progress) -> None:
        self._store = store
        self._writer = writer
        self._progress = progress
        self._said: dict[tuple[str, int | None], Fact] = {}
        """What was committed so far: weights and state of one revision may move with different objects."""

    def run(self, sparse: Sequence[Compact]) -> list[str]:
        """Returns what could not be copied, with the reason."""
        damaged: list[str] = []
        for i, batch in enumerate(batches := _batches(sparse)):
            self._progress("compact", i, len(batches))
            try:
                self._move(batch)
            except (DigestMismatch, ObjectNotFound):
                damaged += self._one_by_one(batch)
        if batches:
            self._progress("compact", len(batches), len(batches))
        return damaged

    def _one_by_one(self, batch: Sequence[Compact]) -> list[str]:
        damaged: list[str] = []
        for item in batch:
            try:
                self._move([item])
            except (DigestMismatch, ObjectNotFound) as e:
                damaged.append(str(e))
        return damaged

    def _move(self, batch: Sequence[Compact]) -> None:
        """Raises DigestMismatch or ObjectNotFound before anything is committed."""
        moves = _copy(self._store, [r for item in batch for r in item.ranges])
        moved: dict[tuple[str, int | None], Fact] = {}
        for fact in (f for item in batch for f in item.facts):
            key = (fact.member, fact.revision)
            moved[key] = _with_places(moved.get(key) or self._said.get(key) or fact, moves)
        _commit(self._writer, list(moved.values()), silent)
        self._said |= moved


def _batches(sparse: Sequence[Compact]) -> list[list[Compact]]:
    """Objects of one folder whose live bytes fit one new object."""
    made: list[list[Compact]] = []
    for _, some in groupby(sorted(sparse, key=lambda c: c.path), key=lambda c: _folder(c.path)):
        made += portions(some, size=lambda c: sum(r.length for r in c.ranges), most=SEGMENT_BYTES)
    return made


def _copy(store: PopulationStore, ranges: Sequence[ByteRange]) -> dict[ByteRange, ByteRange]:
    """Old place → new place, all in one new object; digests are checked on the way, and it is never whole in memory."""
    path = f"{_folder(ranges[0].path)}/{ULID()}.seg"
    moves: dict[ByteRange, ByteRange] = {}
    offset = 0
    for place in ranges:
        moves[place] = place.model_copy(update={"path": path, "offset": offset})
        offset += place.length
    with ThreadPoolExecutor(1) as pool:
        store.objects.put(path, _read_ahead(store, ranges, pool))
    return moves


def _read_ahead(store: PopulationStore, ranges: Sequence[ByteRange], pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Checked bytes, a chunk ahead. Read in a thread of `pool`: obstore cannot read in the thread where it writes."""
    ahead: deque[Future[list[bytes]]] = deque()
    for part in chunks(ranges, most=_CHUNK_BYTES):
        ahead.append(pool.submit(store.read_many, part))
        if len(ahead) == _CHUNKS_AHEAD:
            yield from ahead.popleft().result()
    for rest in ahead:
        yield from rest.result()


def _with_places(fact: Fact, moves: dict[ByteRange, ByteRange]) -> Fact:
    if fact.weights is not None and (to := moves.get(fact.weights)) is not None:
        fact = dataclasses.replace(fact, segment=to.path, offset=to.offset)
    if fact.state is not None and (to := moves.get(fact.state)) is not None:
        fact = dataclasses.replace(fact, state_segment=to.path, state_offset=to.offset)
    return fact


def _folder(path: str) -> str:
    return path.partition("/")[0]
