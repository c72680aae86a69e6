"""`allele simulate`: what a traffic would meet, before there is a cluster to try it on."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from allele.residency.replica import BULK, NATIVE, PUBLISHED, Costs, Setup
from allele.residency.simulate import Mode, simulate
from allele.residency.traces import BadTrace, Event, Traffic, read
from allele_cli.failure import Failure
from allele_cli.output import Format, FormatOption, show

app = typer.Typer(help="Models of a serving replica.", no_args_is_help=True)
T = TypeVar("T", Setup, Costs)
TRAFFIC = Traffic()


class Preset(enum.StrEnum):
    bulk = "bulk"
    native = "native"
    published = "published"


PRESETS = {Preset.bulk: BULK, Preset.native: NATIVE, Preset.published: PUBLISHED}


def _defaults(values: Setup | Costs) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in dataclasses.asdict(values).items())


@app.callback()
def models() -> None:
    """Models of a serving replica."""


@app.command()
def residency(
    trace: Annotated[
        Path | None, typer.Argument(help="CSV of time,member (seconds); the options for traffic count without it.")
    ] = None,
    members: Annotated[int, typer.Option(min=1, help="Catalogue.")] = TRAFFIC.members,
    zipf: Annotated[float, typer.Option(min=0.0, help="Skew of popularity.")] = TRAFFIC.zipf,
    rate: Annotated[float, typer.Option(min=0.0, help="Requests a second.")] = TRAFFIC.rate,
    seconds: Annotated[float, typer.Option(min=0.0, help="Length.")] = TRAFFIC.seconds,
    burst: Annotated[float, typer.Option(min=0.0, help="Factor on the rate in 4 of every 20 s.")] = TRAFFIC.burst,
    storm: Annotated[int, typer.Option(min=0, help="Most popular members with a new revision, half way.")] = (
        TRAFFIC.storm
    ),
    seed: Annotated[int, typer.Option(min=0)] = TRAFFIC.seed,
    costs: Annotated[
        Preset, typer.Option(help="How adapters are registered: in bulk, by native calls, or as MinT published.")
    ] = Preset.bulk,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help=f"Replica: {_defaults(Setup())}. Seconds of bulk: {_defaults(BULK)}."
        ),
    ] = None,
    output: FormatOption = Format.table,
) -> None:
    """Time to first token, hits, refusals and stalls of one replica, for three ways to deal with cold adapters.

    off: each loads at once, and requests run first come first served. admission: loads are bounded and requests run by
    the schedule. two-phase: as admission, and a new revision takes requests only when it is loaded.

    HOT to COLD: share of requests by where their adapter was. WARM and COLD p50, p95: seconds to the first token.

    Example: `allele simulate residency --storm 200 --set slots=32 --set warm=1000`
    """
    traffic = Traffic(members=members, zipf=zipf, rate=rate, seconds=seconds, burst=burst, storm=storm, seed=seed)
    events = traffic.events() if trace is None else _read(trace)
    changes = _changes(change or ())
    setup, price = _changed(Setup(), changes), _changed(PRESETS[costs], changes)
    if changes:
        known = ", ".join(f.name for kind in (Setup, Costs) for f in dataclasses.fields(kind))
        raise Failure(f"--set {next(iter(changes))}: expected one of {known}")
    show([dataclasses.asdict(simulate(events, mode, setup=setup, costs=price)) for mode in Mode], fmt=output)


def _read(path: Path) -> list[Event]:
    try:
        return read(path.read_text().splitlines())
    except (BadTrace, UnicodeDecodeError) as e:
        raise Failure(f"{path}: {e}") from e


def _changes(pairs: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError as e:
            raise Failure(f"--set {pair}: expected NAME=VALUE with a number") from e
        if not math.isfinite(found[name]):
            raise Failure(f"--set {pair}: expected a finite number")
    return found


def _changed(values: T, changes: dict[str, float]) -> T:
    """`values` with those of `changes` that it has, which are taken out of them."""
    taken: dict[str, Any] = {}
    for name, default in dataclasses.asdict(values).items():
        if name in changes:
            value = changes.pop(name)
            if isinstance(default, int) and not value.is_integer():
                raise Failure(f"--set {name}: expected a whole number, found {value:g}")
            taken[name] = type(default)(value)
    try:
        return dataclasses.replace(values, **taken)
    except ValueError as e:
        raise Failure(f"--set {e}") from e
