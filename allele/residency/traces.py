"""Traffic for the simulator and the benchmark: seeded, or read from a log. Pure: lines in, events out.

Popularity follows Zipf's law, arrivals a Poisson process, with bursts and storms in which many members get a new
revision at once, as when a training step of a whole population is exposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np


class BadTrace(ValueError):
    """A row of a trace that is no time and member."""


@dataclasses.dataclass(frozen=True)
class Request:
    time: float
    """Seconds."""
    member: str


@dataclasses.dataclass(frozen=True)
class Publish:
    """These members have a new revision."""

    time: float
    members: tuple[str, ...]


Event = Request | Publish


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A seeded trace."""

    members: int = 4000
    """Catalogue: members that exist."""
    zipf: float = 1.0
    """Skew of their popularity: 0 none, 1.2 much."""
    rate: float = 6.0
    """Requests a second on average, outside of bursts."""
    seconds: float = 300.0
    burst: float = 1.0
    """Factor on the rate in the first fifth of every 20 seconds."""
    storm: int = 0
    """Most popular members that get a new revision at half time."""
    seed: int = 0

    def events(self) -> list[Event]:
        """In order of time."""
        times = self._times()
        ranks = zipf(self.members, self.zipf, len(times), seed=self.seed)
        found: list[Event] = [Request(t, f"m{r}") for t, r in zip(times, ranks, strict=True)]
        if self.storm:
            found.append(Publish(self.seconds / 2, tuple(f"m{r}" for r in range(min(self.storm, self.members)))))
        return sorted(found, key=lambda event: event.time)

    def _times(self) -> list[float]:
        """Arrivals at the burst's rate, thinned to the rate outside of bursts."""
        rng = np.random.default_rng(self.seed)
        top = self.rate * max(1.0, self.burst)
        times = np.sort(rng.uniform(0.0, self.seconds, rng.poisson(top * self.seconds)))
        rates = np.where(times % 20.0 < 4.0, self.rate * self.burst, self.rate)
        kept: list[float] = times[rng.uniform(size=len(times)) * top < rates].tolist()
        return kept


def zipf(members: int, exponent: float, count: int, *, seed: int) -> list[int]:
    """`count` draws of ranks from 0, rank r with weight 1 / (r + 1) ** exponent."""
    weights = np.cumsum(1.0 / np.arange(1, members + 1) ** exponent)
    drawn = np.random.default_rng(seed + 1).uniform(0.0, weights[-1], count)
    ranks: list[int] = np.minimum(np.searchsorted(weights, drawn), members - 1).tolist()
    return ranks


def read(lines: Iterable[str]) -> list[Event]:
    """Rows `time,member`, time in seconds; a header, blank lines and what follows a `#` are left out.

    Raises BadTrace with the row, what was expected and what was found.
    """
    found: list[Event] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text or (number == 1 and text.lower() == "time,member"):
            continue
        cells = text.split(",")
        if len(cells) != 2 or not cells[1].strip():
            raise BadTrace(f"row {number}: expected time,member, found {text!r}")
        try:
            time = float(cells[0])
        except ValueError:
            time = math.nan
        if not math.isfinite(time):
            raise BadTrace(f"row {number}: expected a time in seconds, found {cells[0]!r}")
        found.append(Request(time, cells[1].strip()))
    return sorted(found, key=lambda event: event.time)


def requested(events: Sequence[Event]) -> list[str]:
    """The members that are asked for, in order."""
    return [event.member for event in events if isinstance(event, Request)]
