"""Heads: of all facts those that still say what a member is now, so that a gateway need not read and hold a history.

A snapshot is `catalogue/_heads/<version>.parquet`, rows as in the catalogue. A collector writes one at the end of its
pass, when it has read all facts anyway; a reader takes the newest and follows the log from its version on. It is made
from the catalogue and never the only copy of anything: one that is missing or damaged costs the reader the long way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from allele.store import delta
from allele.store.columns import Columns
from allele.store.facts import KINDS, SCHEMA
from allele.store.objects import Objects

FOLDER = "_heads"

Mask = npt.NDArray[np.bool_]


def select(columns: Columns) -> pa.Table:
    """The facts that count.

    An index made of them answers as one made of all, but for retired revisions and for what a run or a digest has
    been: of the retired it knows those that are parents or the highest of their member.
    """
    kind, member, revision, parent = columns.kinds, columns.owners, columns.revisions, columns.parents
    span = int(max(revision.max(initial=0), parent.max(initial=0))) + 1
    key = member * span + revision

    def of(*kinds: str) -> Mask:
        return np.isin(kind, [KINDS.index(k) for k in kinds])

    committed, retired = of("Committed"), of("Retired")
    served = _last(of("Exposed"), member) | _last(of("Held"), member)
    standing = _last(committed, key) & ~np.isin(key, key[retired])
    parents = (member * span + parent)[standing & (parent > 0)]
    highest = _highest(committed, member, revision)
    needed = np.unique(np.concatenate([key[standing], parents, key[served], key[highest]]))
    told = (
        _last(committed, key) | _last(of("Exposed"), key) | _last(of("Pinned", "Unpinned"), key) | of("Abandoned")
    ) | retired
    early = ~np.isin(key, key[committed])  # the commit is yet to be seen
    later = kind < 0  # a later version's facts count as that version says
    return columns.rows((told & (np.isin(key, needed) | early)) | served | later)


def write(catalogue: Objects, version: int, facts: Columns) -> None:
    """Replaces earlier snapshots; a reader that has just chosen one of them goes the long way."""
    path = _path(version)
    old = [o.path for o in catalogue.list(FOLDER) if o.path < path]
    catalogue.put(path, delta.encoded(select(facts)))
    catalogue.delete(old)


def newest(catalogue: Objects) -> tuple[int, Columns] | None:
    """The version of the newest snapshot, and its facts. Raises ObjectNotFound or StoreUnavailable."""
    found = version(catalogue)
    return None if found < 0 else (found, Columns(delta.read(catalogue, [_path(found)], SCHEMA)))


def version(catalogue: Objects) -> int:
    """Of the newest snapshot; -1 without one."""
    numbers = (o.path.removeprefix(f"{FOLDER}/").removesuffix(".parquet") for o in catalogue.list(FOLDER))
    return max((int(n) for n in numbers if n.isdecimal()), default=-1)


def _path(version: int) -> str:
    return f"{FOLDER}/{version:020d}.parquet"


def _last(chosen: Mask, key: npt.NDArray[np.int64]) -> Mask:
    """Of the chosen rows, which are in the order in which they count, the last one of each key."""
    rows = np.flatnonzero(chosen)[::-1]
    mask = np.zeros(len(chosen), np.bool_)
    mask[rows[np.unique(key[rows], return_index=True)[1]]] = True
    return mask


def _highest(chosen: Mask, member: npt.NDArray[np.int64], revision: npt.NDArray[np.int64]) -> Mask:
    """Of the chosen rows, one with the highest revision of each member."""
    rows = np.flatnonzero(chosen)
    rows = rows[np.lexsort((revision[rows], member[rows]))]
    mask = np.zeros(len(chosen), np.bool_)
    ends = np.flatnonzero(np.diff(member[rows], append=-1))
    mask[rows[ends]] = True
    return mask
