"""Facts as columns: what an index is loaded from, a million members in seconds.

Python objects for every fact would take a kilobyte and forty microseconds each. Here they stay Arrow, with the facts of
a member found through a permutation of the rows, and become objects when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from allele.store.facts import KINDS, SCHEMA, Fact, Kind, from_arrow, from_row

Ints = npt.NDArray[np.int64]

_SHARED = ("group", "segment", "state_segment", "run", "provenance", "shape", "reason", "kind")
"""Columns with few different values: held once each."""


class Columns:
    """A catalogue's facts up to a version, those of a member in the order in which they count."""

    def __init__(self, table: pa.Table) -> None:
        """`table`: SCHEMA's columns, in any order of rows."""
        self._table = compact(table)
        names = pc.dictionary_encode(self._table["member"].combine_chunks())
        members = names.indices.to_numpy()
        runs = self._table["run"].combine_chunks()
        run = pc.rank(runs.dictionary, tiebreaker="min").to_numpy()[runs.indices.to_numpy()]
        time = self._table["time"].cast(pa.int64()).to_numpy()
        step, revision = (pc.fill_null(self._table[name], 0).to_numpy() for name in ("step", "revision"))
        self._rows: Ints = np.lexsort((revision, step, run, time, members))
        self._ends: Ints = np.cumsum(np.bincount(members, minlength=len(names.dictionary)))
        kinds = self._table["kind"].combine_chunks()
        codes = [KINDS.index(k) if k in KINDS else -1 for k in kinds.dictionary.to_pylist()]
        self.kinds = np.array(codes, np.int8)[kinds.indices.to_numpy()[self._rows]]
        """By place: number of the kind in KINDS, or -1 for one that a later version knows."""
        self.revisions: Ints = revision[self._rows].astype(np.int64)
        """By place; 0 without one."""
        self._places: Mapping[str, int] = {name: i for i, name in enumerate(names.dictionary.to_pylist())}

    @classmethod
    def empty(cls) -> Columns:
        return cls(SCHEMA.empty_table())

    def __len__(self) -> int:
        """Facts."""
        return len(self._rows)

    @property
    def owners(self) -> Ints:
        """By place: number of the member."""
        return np.repeat(np.arange(len(self._ends)), np.diff(self._ends, prepend=0))

    @property
    def parents(self) -> Ints:
        """By place; 0 without one."""
        found: Ints = pc.fill_null(self._table["parent"], 0).to_numpy()[self._rows]
        return found

    def rows(self, chosen: npt.NDArray[np.bool_]) -> pa.Table:
        """The facts at these places."""
        return self._table.take(pa.array(self._rows[chosen]))

    @property
    def table(self) -> pa.Table:
        """The facts, in no order."""
        return self._table

    @property
    def members(self) -> Mapping[str, int]:
        """Names; the numbers mean nothing outside."""
        return self._places

    def of(self, member: str) -> Iterator[tuple[str, int, int]]:
        """(kind, revision or 0, place) of each fact of a member, in order; `fact` gives the one at a place."""
        at = self._places.get(member)
        if at is None:
            return
        begin, end = int(self._ends[at - 1]) if at else 0, int(self._ends[at])
        kinds, revisions = self.kinds[begin:end].tolist(), self.revisions[begin:end].tolist()
        for place, kind, revision in zip(range(begin, end), kinds, revisions, strict=True):
            if kind >= 0:  # a later version's is none of ours
                yield KINDS[kind], revision, place

    def fact(self, place: int) -> Fact:
        row = int(self._rows[place])
        return from_row({name: column[row].as_py() for name, column in self._arrays.items()})

    def facts(self, *, run: str | None = None) -> Iterator[Fact]:
        """All of them, or those of a run, in the order in which they count over all members."""
        found = self._table if run is None else self._table.filter(pc.equal(self._table["run"].cast(pa.string()), run))
        yield from sorted(from_arrow(found), key=lambda f: f.order)

    def with_kind(self, *kinds: Kind) -> set[str]:
        """Members with a fact of these kinds."""
        chosen = np.isin(self.kinds, [KINDS.index(kind) for kind in kinds])
        at = np.unique(np.searchsorted(self._ends, np.flatnonzero(chosen), side="right"))
        names = list(self._places)
        return {names[i] for i in at.tolist()}

    def with_digest(self, digest: str) -> list[Fact]:
        """Committed facts of the same bytes."""
        found = pc.indices_nonzero(pc.equal(self._table["digest"], digest)).to_pylist()
        return [from_row({name: column[row].as_py() for name, column in self._arrays.items()}) for row in found]

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        return {name: self._table[name].combine_chunks() for name in SCHEMA.names}


def compact(table: pa.Table) -> pa.Table:
    """Columns with few different values as dictionaries, each column in one piece."""
    for name in _SHARED:
        at = table.schema.get_field_index(name)
        if not pa.types.is_dictionary(table.schema.field(at).type):
            table = table.set_column(at, name, pc.dictionary_encode(table[name]))
    return table.unify_dictionaries().combine_chunks()
