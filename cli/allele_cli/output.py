"""Tables for people; JSON, YAML and Parquet for programs: the same rows."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from allele_cli.failure import Failure


class Format(enum.StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"
    parquet = "parquet"


FormatOption = Annotated[
    Format, typer.Option("--output", "-o", help="parquet goes to a file: `-o parquet > rows.parquet`.")
]


def show(rows: Sequence[dict[str, Any]], *, fmt: Format, title: str = "") -> None:
    """Print rows that all have the same keys; numbers are right-aligned, None is a dash.

    Raises Failure for Parquet on a terminal.
    """
    match fmt:
        case Format.json:
            print(json.dumps(list(rows), indent=2, default=str))
        case Format.yaml:
            print(yaml.safe_dump(json.loads(json.dumps(list(rows), default=str)), sort_keys=False), end="")
        case Format.parquet:
            _write_parquet(rows)
        case Format.table:
            _print_table(rows, title)


def _write_parquet(rows: Sequence[dict[str, Any]]) -> None:
    if sys.stdout.isatty():
        raise Failure("-o parquet: expected a file or a pipe, found a terminal; add > FILE")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    sys.stdout.flush()
    sys.stdout.buffer.write(sink.getvalue())


def _print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for key in rows[0] if rows else ():
        number = any(isinstance(row[key], int | float) for row in rows)
        table.add_column(key.replace("_", " ").upper(), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(v) for v in row.values()))
    Console().print(table if rows else "nothing found")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
