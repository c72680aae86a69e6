"""How often an adapter is already there: Tier against least recently used and first in first out, on the same requests.

Popularity follows Zipf's law; `moves`: every 20,000 requests other members become the popular ones, which is where a
policy that remembers pays for it. All begin empty, and misses on the way to being full count.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from allele.residency import Tier
from allele.residency.traces import zipf
from bench.report import Report

REQUESTS = 200_000
MOVES = 20_000
CASES = (
    (0.8, 64, 1_000_000),
    (0.8, 512, 1_000_000),
    (1.0, 64, 1_000_000),
    (1.0, 512, 1_000_000),
    (1.2, 64, 100_000),
    (1.2, 512, 100_000),
)
"""Skew, places, catalogue."""


class Policy(Protocol):
    def hit(self, name: int) -> bool:
        """Whether it is there; it is afterwards."""
        ...


class Ours:
    def __init__(self, places: int) -> None:
        self._tier: Tier[int] = Tier(places=places)

    def hit(self, name: int) -> bool:
        if self._tier.touch(name):
            return True
        self._tier.admit(name)
        return False


class Fifo:
    def __init__(self, places: int) -> None:
        self._places = places
        self._names: OrderedDict[int, None] = OrderedDict()

    def hit(self, name: int) -> bool:
        if name in self._names:
            self._again(name)
            return True
        if len(self._names) == self._places:
            self._names.popitem(last=False)
        self._names[name] = None
        return False

    def _again(self, name: int) -> None: ...


class Lru(Fifo):
    def _again(self, name: int) -> None:
        self._names.move_to_end(name)


def measure(report: Report) -> None:
    for exponent, places, members in CASES:
        names = zipf(members, exponent, REQUESTS, seed=0)
        short = f"{members // 1000}k" if members < 10**6 else f"{members // 10**6}M"
        for what, trace in (("zipf", names), ("moving zipf", moving(names, members))):
            _compare(report, f"hit ratio {what}{exponent} {places} of {short}", trace, places)


def moving(names: Sequence[int], members: int) -> list[int]:
    """The same skew, with other names after every MOVES requests."""
    offsets = np.random.default_rng(0).integers(0, members, len(names) // MOVES + 1).repeat(MOVES)[: len(names)]
    moved: list[int] = ((np.asarray(names) + offsets) % members).tolist()
    return moved


def ratio(policy: Policy, names: Iterable[int]) -> float:
    found = [policy.hit(name) for name in names]
    return sum(found) / len(found)


def _compare(report: Report, what: str, names: Sequence[int], places: int) -> None:
    ours = ratio(Ours(places), names)
    report.rows.append({"what": what, "by": "allele", "hit ratio": ours})
    for name, rival in (("LRU", Lru(places)), ("FIFO", Fifo(places))):
        found = ratio(rival, names)
        report.rows.append({"what": what, "by": name, "hit ratio": found, "times": ours / found})
        report.ratios[f"{what} vs {name}"] = ours / found
