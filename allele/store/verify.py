"""Verification: are the bytes that the catalogue names those that it recorded? Reads everything, changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from allele.protocol.commands import ByteRange
from allele.protocol.errors import DigestMismatch
from allele.store.errors import ObjectNotFound, StoreUnavailable
from allele.store.facts import Fact
from allele.store.index import Index
from allele.store.population import RECORD, PopulationStore, chunks

_THREADS = 8
_CHUNK_BYTES = 16 << 20
"""Read at once by each thread; a larger range is read whole."""

Progress = Callable[[int, int], None]
"""Called with bytes that are checked and bytes that there are."""

_Places = Mapping[ByteRange, Sequence[Fact]]


def _silent(done: int, total: int) -> None:
    """Nobody watches."""


@dataclasses.dataclass(frozen=True, order=True)
class Damage:
    """What of a revision is not as recorded."""

    member: str
    revision: int
    what: str
    """weights, state, provenance or shape."""
    object: str
    """Path in the population's folder, with the offset where it is a range."""
    expected: str
    found: str


@dataclasses.dataclass(frozen=True)
class Verified:
    revisions: int
    ranges: int
    bytes: int
    damaged: tuple[Damage, ...]


def verify(
    store: PopulationStore, *, member: str | None = None, states: bool = True, progress: Progress = _silent
) -> Verified:
    """Every revision that is not retired, of one member or of all. Raises StoreUnavailable when the store does not
    answer: damage is only what it did answer."""
    facts = list(_committed(Index.load(store.catalogue), member))
    weights = _by_place((f, f.weights) for f in facts)
    state = _by_place((f, f.state) for f in facts) if states else {}
    damaged = [*_provenance(store, facts), *_shapes(store, facts)]
    total = sum(r.length for r in (*weights, *state))
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for what, places in (("weights", weights), ("state", state)):
            for chunk, wrong in pool.map(lambda c: (c, _wrong(store, c)), chunks(places, most=_CHUNK_BYTES)):
                done += sum(r.length for r in chunk)
                progress(done, total)
                damaged += [_damage(f, what, place, found) for place, found in wrong for f in places[place]]
    return Verified(len(facts), len(weights) + len(state), total, tuple(sorted(damaged)))


def _committed(index: Index, member: str | None) -> Iterator[Fact]:
    for name in sorted(index.members()) if member is None else [member]:
        for revision in range(1, index.next_revision(name)):
            fact = index.get(name, revision)
            if fact is not None and not index.is_retired(name, revision):
                yield fact


def _by_place(facts: Iterator[tuple[Fact, ByteRange | None]]) -> dict[ByteRange, list[Fact]]:
    """Range → facts that name it, in the order in which they are to be read."""
    found: dict[ByteRange, list[Fact]] = {}
    for fact, place in facts:
        if place is not None:
            found.setdefault(place, []).append(fact)
    return dict(sorted(found.items(), key=lambda item: (item[0].path, item[0].offset)))


def _wrong(store: PopulationStore, chunk: Sequence[ByteRange]) -> list[tuple[ByteRange, str]]:
    """Ranges whose bytes are not those recorded, and what was found."""
    path = chunk[0].path
    try:
        parts = store.objects.get_ranges(path, [r.offset for r in chunk], [r.length for r in chunk])
    except ObjectNotFound:
        return [(r, "no such object") for r in chunk]
    except StoreUnavailable:  # a range that begins beyond the end fails the request for all
        size = store.objects.head(path).size
        begun = [r for r in chunk if r.offset < size]
        if len(begun) == len(chunk):
            raise
        missing = [(r, f"0 of {r.length} bytes") for r in chunk if r.offset >= size]
        return missing + (_wrong(store, begun) if begun else [])
    found = ((r, b, hashlib.sha256(b).hexdigest()) for r, b in zip(chunk, parts, strict=True))
    return [
        (r, digest if len(b) == r.length else f"{len(b)} of {r.length} bytes")
        for r, b, digest in found
        if digest != r.digest
    ]


def _damage(fact: Fact, what: str, place: ByteRange, found: str) -> Damage:
    assert fact.revision is not None, "committed facts have a revision"
    return Damage(fact.member, fact.revision, what, f"{place.path} at {place.offset}", place.digest, found)


def _provenance(store: PopulationStore, facts: Sequence[Fact]) -> Iterator[Damage]:
    """Each provenance file once, under the first revision that names it; its shapes against those of the facts."""
    shapes: dict[str, dict[str, str] | None] = {}
    for fact in facts:
        sha = fact.provenance
        if sha is None or fact.revision is None:
            continue
        where = f"provenance/{sha}.json"
        if sha not in shapes:
            try:
                shapes[sha] = {group: s.digest for group, s in store.read_provenance(sha).shapes.items()}
            except (ObjectNotFound, DigestMismatch, ValidationError) as e:
                shapes[sha] = None
                yield Damage(fact.member, fact.revision, "provenance", where, sha, str(e).split("\n", 1)[0])
        told = shapes[sha]
        if told is not None and told.get(fact.group) != fact.shape:
            found = told.get(fact.group, f"no group {fact.group!r}")
            yield Damage(fact.member, fact.revision, "shape", where, str(fact.shape), found)


def _shapes(store: PopulationStore, facts: Sequence[Fact]) -> Iterator[Damage]:
    """population.json against the facts."""
    record = store.record()
    shapes = {} if record is None else record.shapes
    for fact in facts:
        if fact.revision is not None and shapes.get(fact.group) != fact.shape:
            none = "no such object" if record is None else f"no group {fact.group!r}"
            found = shapes.get(fact.group, none)
            yield Damage(fact.member, fact.revision, "shape", RECORD, str(fact.shape), found)
