"""The catalogue of a population: a Delta table of facts, the only place where a revision comes to exist.

Reading does not need deltalake's scanner: the Delta log names the parquet files, and these are read through the same
object client. Tailing reads one log entry per commit and only files that were *added with data*; compaction rewrites
rows without change of data and is skipped. Log entries are not expired (one small object a commit), so that a reader
may fall behind by any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from allele.store import delta, heads
from allele.store import facts as rows
from allele.store.columns import Columns
from allele.store.errors import ObjectNotFound, StoreUnavailable
from allele.store.facts import Fact
from allele.store.objects import Objects

if TYPE_CHECKING:
    from allele.store.writer import Writer

log = logging.getLogger(__name__)

FOLDER = "catalogue"
COMPACT_EVERY = 50
"""Commits between checkpoints, and small files of facts that a compaction merges."""

SMALL_FILE = 4 << 20
"""Bytes; a file of facts below it is worth merging."""

_CONFIGURATION = {"delta.checkpointInterval": str(COMPACT_EVERY), "delta.enableExpiredLogCleanup": "false"}
_LOG_THREADS = 16
"""Log entries that a reader who is behind fetches at once."""

_COMPACTION = "compaction"
"""Application transaction that compactions race on."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """Facts up to `version`: those since another one in the order of commits, or all that count; iterate it."""

    version: int
    facts: Sequence[Fact] = ()
    whole: Columns | None = None
    """All facts there are, or the heads, where they are not those since; `facts` are then those after it."""

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts) if self.whole is None else itertools.chain(self.whole.facts(), self.facts)

    def __len__(self) -> int:
        return len(self.facts) + (0 if self.whole is None else len(self.whole))


class Catalogue:
    """Reads facts and starts writers. Opening it touches nothing; the table comes to exist with the first writer."""

    def __init__(self, folder: Objects) -> None:
        self._objects = folder
        self._table: DeltaTable | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, population: Objects) -> Catalogue:
        """`population` is the folder of the population (`PopulationStore.objects`)."""
        return cls(population.at(FOLDER))

    @property
    def objects(self) -> Objects:
        return self._objects

    def start(self, run_uid: str) -> Writer:
        """Become the only writer of a run: every older one is fenced off. Its `fence` is the epoch of the run.

        The writer gets a table handle of its own: if a reader could move its snapshot forward between the look at the
        fence and the append, Delta would find no conflict with a fence raised in between.
        """
        from allele.store.writer import Writer  # here, or the two modules would import each other at load

        return Writer.start(Catalogue(self._objects), run_uid)

    def version(self) -> int:
        """Newest version, or -1 before the first writer."""
        table = self.snapshot()
        return -1 if table is None else int(table.version())

    def facts(self, since_version: int | None = None, *, history: bool = True) -> Changes:
        """All facts, or only those of commits after a version that an earlier call returned.

        All of them, too, when files of those commits are collected: the reader has slept for longer than the grace
        period. Without `history`, in place of all those that `heads` selects. Raises StoreUnavailable; a failed call
        has no effect and may be repeated.
        """
        try:
            if since_version is not None and since_version >= 0:
                return self._since(since_version)
            if not history and (found := self._heads()) is not None:
                version, whole = found
                return dataclasses.replace(self._since(version), whole=whole)
        except ObjectNotFound as e:
            log.info("reading all facts: %s", e)
        return self._all_facts()

    def _since(self, start: int) -> Changes:
        """Facts after a version. Raises ObjectNotFound when their files are collected."""
        version, paths = start, list[str]()
        with ThreadPoolExecutor(_LOG_THREADS) as pool:
            while True:
                ahead = range(version + 1, version + 1 + (1 if version == start else _LOG_THREADS))
                entries = [e for e in itertools.takewhile(bool, pool.map(self._log_entry, ahead)) if e]
                paths += itertools.chain.from_iterable(map(delta.added_with_data, entries))
                version += len(entries)
                if len(entries) < len(ahead):
                    break
        return Changes(version, tuple(rows.from_arrow(delta.read(self._objects, paths, rows.SCHEMA))))

    def _heads(self) -> tuple[int, Columns] | None:
        try:
            return heads.newest(self._objects)
        except StoreUnavailable as e:
            log.warning("heads are not readable: %s", e)
            return None

    def write_heads(self) -> None:
        """Spare readers that need no history all facts up to now."""
        if self.version() <= heads.version(self._objects):
            return
        found = self._all_facts()
        if found.whole is not None:
            heads.write(self._objects, found.version, found.whole)

    def table(self) -> pa.Table:
        """All facts as Arrow, unordered."""
        _, files = self._live()
        return delta.read(self._objects, [f.path for f in files], rows.SCHEMA)

    def compact(self) -> int:
        """Merge small files of facts and write a checkpoint; returns the new version.

        Readers see the same facts, tails see none again. Losing a race against another compaction is no error.
        """
        table = self.snapshot()
        if table is None:
            return -1
        try:
            with self._lock:
                self._merge_small_files(table)
        except CommitFailedError as e:
            log.info("compaction of %s lost a race: %s", self._objects.url(), e)
        except (DeltaError, OSError) as e:
            raise StoreUnavailable(f"{self._objects.url()}: compaction failed: {e}") from e
        return self.version()

    def snapshot(self, *, create: bool = False) -> DeltaTable | None:
        """The table at its newest version; None when there is none and `create` is not set."""
        with self._lock:
            try:
                if self._table is not None:
                    self._table.update_incremental()
                else:
                    self._table = self._open_table(create=create)
            except (DeltaError, OSError) as e:
                self._table = None
                raise StoreUnavailable(f"{self._objects.url()}: {e}") from e
            return self._table

    def _open_table(self, *, create: bool) -> DeltaTable | None:
        url, options = self._objects.url(), self._objects.delta_options
        try:
            return DeltaTable(url, storage_options=options)
        except TableNotFoundError:
            if not create:
                return None
        with contextlib.suppress(DeltaError):  # another writer was first; if not, the next open says why
            DeltaTable.create(
                url, schema=rows.SCHEMA, mode="error", configuration=_CONFIGURATION, storage_options=options
            )
        return DeltaTable(url, storage_options=options)

    def _live(self) -> tuple[int, list[delta.LiveFile]]:
        table = self.snapshot()
        if table is None:
            return -1, []
        with self._lock:
            return int(table.version()), delta.live_files(table)

    def _all_facts(self) -> Changes:
        version, files = self._live()
        return Changes(version, whole=Columns(delta.read(self._objects, [f.path for f in files], rows.SCHEMA)))

    def _log_entry(self, version: int) -> bytes | None:
        with contextlib.suppress(ObjectNotFound):
            return self._objects.get(f"_delta_log/{version:020d}.json")
        return None

    def _merge_small_files(self, table: DeltaTable) -> None:
        small = [f for f in delta.live_files(table) if f.size < SMALL_FILE]
        if len(small) > 1:
            turn = (table.transaction_version(_COMPACTION) or 0) + 1
            found = delta.read(self._objects, [f.path for f in small], rows.SCHEMA)
            staged = delta.stage(self._objects, found.sort_by([("time", "ascending"), ("member", "ascending")]))
            merged = dataclasses.replace(staged, modified=max(f.modified for f in small))
            delta.replace(table, small, merged, transaction=(_COMPACTION, turn))
            table.update_incremental()
        table.create_checkpoint()
