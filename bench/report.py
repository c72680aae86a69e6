"""A benchmark's table and its JSON: ratios so that more is better, each floor beside what was reached."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class Report:
    """`rows`: one a line of the table; `ratios`: ours against the named rival."""

    name: str
    settings: Mapping[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)

    def finish(self, out: pathlib.Path) -> None:
        """Print the table and the floors; write `<out>/<name>.json`."""
        floors: dict[str, float] = yaml.safe_load((HERE / "floors.yaml").read_text())[self.name]
        console = Console(width=160)
        console.print(_table(self.name, self.rows))
        for key, floor in floors.items():
            found = self.ratios.get(key)
            text = "not measured" if found is None else f"{found:.2f}"
            met = found is not None and found >= floor
            console.print(f"{'met  ' if met else 'MISSED'} {key}: floor {floor}, found {text}")
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}.json"
        body = {
            "name": self.name,
            "machine": machine(),
            "settings": self.settings,
            "rows": self.rows,
            "ratios": {k: round(v, 3) for k, v in self.ratios.items()},
            "floors": floors,
        }
        path.write_text(json.dumps(body, indent=1) + "\n")
        console.print(f"written: {path}")


def machine() -> dict[str, Any]:
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def _lines(path: str) -> Sequence[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=name)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
