"""Tables for people, JSON and YAML for programs: the same rows."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table


class Format(enum.StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


def show(rows: Sequence[dict[str, Any]], *, fmt: Format, title: str = "") -> None:
    """Print rows that all have the same keys; numbers are right-aligned, None is a dash."""
    if fmt is Format.json:
        print(json.dumps(list(rows), indent=2, default=str))
        return
    if fmt is Format.yaml:
        print(yaml.safe_dump(json.loads(json.dumps(list(rows), default=str)), sort_keys=False), end="")
        return
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
