"""Erasure of a population: all that lies in its folder goes, and nothing of anybody else.

    population.json says "erasing" ─► catalogue ─► segments, states, provenance ─► what came since ─► population.json

The record is written first, on the condition that it is still the one that was read, and removed last. So whoever
claims the folder is refused from the first write to the last, and after SIGKILL anywhere the next attempt finds whose
erasure it is and goes on. The record is read again before each batch: an erasure that slept while another one finished
and a successor claimed the folder stops, at the latest one batch after it wakes up. What a writer adds after the end,
a trainer whose driver is gone for instance, has no record and is an orphan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

from allele.store.catalogue import FOLDER
from allele.store.collect import Progress, silent
from allele.store.errors import AlreadyExists, OwnershipError, StoreUnavailable
from allele.store.objects import ObjectInfo
from allele.store.population import RECORD, PopulationRecord, PopulationStore

BATCH = 1000
"""Objects deleted between two looks at the record."""

_THREADS = 16
_MARKS = 8
_SWEEPS = 5
"""Listings until nothing new is found; after that somebody still writes."""

_ORDER = (f"{FOLDER}/_delta_log/", f"{FOLDER}/", "")
"""What goes first: without the log no revision exists, and what is left is garbage that nobody reads."""


@dataclasses.dataclass(frozen=True)
class Erased:
    """What became of the folder."""

    outcome: Literal["Erased", "NothingThere", "OwnedByAnother"]
    owner: str
    """Uid in the record; OwnedByAnother: somebody else's, and nothing was deleted."""
    objects: int = 0
    """Deleted by this attempt, the record included."""
    size: int = 0
    """Their bytes."""


def erase(store: PopulationStore, *, uid: str, progress: Progress = silent) -> Erased:
    """Delete the folder of the population `uid`. Repeating it after anything that went wrong goes on.

    Raises OwnershipError when somebody else has the folder in the middle of it, StoreUnavailable when something still
    writes there.
    """
    owner = _mark(store, uid)
    if owner is None:
        return Erased("NothingThere", uid)
    if owner != uid:
        return Erased("OwnedByAnother", owner)
    objects = size = 0
    for _ in range(_SWEEPS):
        found = [o for o in store.objects.list() if o.path != RECORD]
        if not found:
            _check_mine(store, uid)
            size += store.objects.head(RECORD).size
            store.objects.delete([RECORD])
            return Erased("Erased", uid, objects + 1, size)
        _delete(store, uid, found, progress)
        objects, size = objects + len(found), size + sum(o.size for o in found)
    raise StoreUnavailable(f"{store.objects.url()}: something still writes here: new objects after {_SWEEPS} listings")


def _mark(store: PopulationStore, uid: str) -> str | None:
    """Uid of the owner, the mark being written where it is `uid`; None when nothing lies there.

    Leftovers without a record are this population's by name: they are marked too, unless somebody claims them first.
    """
    for _ in range(_MARKS):
        there = store.recorded()
        try:
            if there is None:
                if next(store.objects.list(), None) is None:
                    return None
                left = PopulationRecord(uid=uid, base_digest="", shapes={}, erasing=True)
                store.objects.create(RECORD, left.model_dump_json().encode())
                return uid
            record, version = there
            if record.uid == uid and not record.erasing:
                marked = record.model_copy(update={"erasing": True})
                store.objects.replace(RECORD, marked.model_dump_json().encode(), version=version)
            return record.uid
        except AlreadyExists:
            continue  # somebody wrote it after we had looked, or this very write was repeated: look again
    raise StoreUnavailable(f"{store.objects.url(RECORD)}: others write it all the time; erase again")


def _check_mine(store: PopulationStore, uid: str) -> None:
    record = store.record()
    if record is None or record.uid != uid or not record.erasing:
        raise OwnershipError(
            f"{store.objects.url(RECORD)}: expected population {uid} being erased, found "
            f"{'no record' if record is None else record.uid}: another erasure has finished; nothing more is deleted"
        )


def _delete(store: PopulationStore, uid: str, found: Sequence[ObjectInfo], progress: Progress) -> None:
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for folder, paths in _parts(found):
            for batch in _batches(paths):
                _check_mine(store, uid)
                list(pool.map(lambda path: store.objects.delete([path]), batch))
                done += len(batch)
                progress(f"delete {folder or 'the rest'}", done, len(found))


def _parts(found: Iterable[ObjectInfo]) -> Iterator[tuple[str, list[str]]]:
    """Folder → its paths, in the order in which they must go."""
    paths = {o.path for o in found}
    for folder in _ORDER:
        part = sorted(p for p in paths if p.startswith(folder))
        paths -= set(part)
        if part:
            yield folder, part


def _batches(paths: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(paths)
    while batch := list(islice(rest, BATCH)):
        yield batch
