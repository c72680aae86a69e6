"""The few things that a catalogue asks of Delta: live files, rows in and out, and one kind of commit.

Every commit goes through `commit`, with application transactions: they are what makes delta-rs refuse one that was
made from an older snapshot than another under the same ids. Its own `optimize` drops them, and lets two compactions
of one snapshot both succeed, so compaction is written with `commit` as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.transaction import AddAction, RemoveAction
from ulid import ULID

from allele.store.errors import StoreUnavailable
from allele.store.objects import Objects

_READ_THREADS = 8
_COMMIT_RETRIES = 50
"""Other runs' commits that may come between the snapshot and this one; each is checked for conflict."""


@dataclasses.dataclass(frozen=True)
class LiveFile:
    """A parquet file of the table; `modified` (milliseconds) is never before the newest fact in it."""

    path: str
    size: int
    modified: int


def live_files(table: DeltaTable) -> list[LiveFile]:
    columns = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes", "modification_time"])
    rows = zip(*(c.to_pylist() for c in columns.columns), strict=True)
    return [LiveFile(unquote(path), size, modified) for path, size, modified in rows]


def stage(objects: Objects, rows: pa.Table) -> LiveFile:
    """Write rows as a new parquet file, which does not count until a commit adds it."""
    data = encoded(rows)
    path = f"{ULID()}.parquet"
    objects.put(path, data)
    return LiveFile(path, len(data), milliseconds(datetime.now(UTC)))


def encoded(rows: pa.Table) -> bytes:
    """A parquet file with a checksum of each page."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def read(objects: Objects, paths: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Rows of files of the table, whether live or since compacted away; columns that a file has not are null.

    Raises StoreUnavailable for bytes that are not those written: most often they were damaged on the way.
    """

    def one(path: str) -> pa.Table:
        data = objects.get(path)
        try:
            with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
                there = set(file.schema_arrow.names)
                found = file.read([name for name in schema.names if name in there], use_threads=False)
            for field in schema:
                if field.name not in there:
                    found = found.append_column(field, pa.nulls(found.num_rows, field.type))
            return found.select(schema.names).cast(schema)
        except (pa.ArrowException, OSError) as e:
            raise StoreUnavailable(f"{objects.url(path)}: expected a whole parquet file of facts, found: {e}") from e

    if not paths:
        return schema.empty_table()
    with ThreadPoolExecutor(min(_READ_THREADS, len(paths))) as pool:
        return pa.concat_tables(pool.map(one, paths))


def added_with_data(entry: bytes) -> list[str]:
    """Paths of the files that one entry of the Delta log adds with new rows."""
    actions = (json.loads(line).get("add") for line in entry.splitlines() if line.strip())
    return [unquote(a["path"]) for a in actions if a is not None and a["dataChange"]]


def add_columns(table: DeltaTable, schema: pa.Schema) -> None:
    """Make the table's schema know columns that it was made without. Raises DeltaError when another writer is first."""
    known = {field.name for field in table.schema().fields}
    missing = [field for field in schema if field.name not in known]
    if missing:
        table.alter.add_columns(list(Schema.from_arrow(pa.schema(missing)).fields))


def commit(table: DeltaTable, transactions: Sequence[tuple[str, int]], add: LiveFile | None = None) -> None:
    """Add a file of new rows (or none) under application transactions. Raises CommitFailedError on a conflict."""
    _commit(table, [] if add is None else [_add(add, data_change=True)], transactions)


def replace(table: DeltaTable, old: Sequence[LiveFile], new: LiveFile, *, transaction: tuple[str, int]) -> None:
    """Put one file with the same rows in place of several; tails take no notice."""
    now = milliseconds(datetime.now(UTC))
    removed = [
        RemoveAction(path=f.path, data_change=False, deletion_timestamp=now, size=f.size, partition_values={})
        for f in old
    ]
    _commit(table, [*removed, _add(new, data_change=False)], [transaction])


def _add(file: LiveFile, *, data_change: bool) -> AddAction:
    return AddAction(file.path, file.size, {}, file.modified, data_change, "{}")


def _commit(
    table: DeltaTable, actions: list[AddAction | RemoveAction], transactions: Sequence[tuple[str, int]]
) -> None:
    table.create_write_transaction(
        actions=actions,
        mode="append",
        schema=table.schema(),
        commit_properties=CommitProperties(
            app_transactions=[Transaction(name, version) for name, version in transactions],
            max_commit_retries=_COMMIT_RETRIES,
        ),
    )


def milliseconds(time: datetime) -> int:
    """Rounded up."""
    return -(-int(time.timestamp() * 1_000_000) // 1000)
