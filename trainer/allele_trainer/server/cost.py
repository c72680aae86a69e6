"""Batched or one by one: which is faster, from the micro-batches timed so far. Pure.

Batching saves what a micro-batch costs however small it is; one member at a time keeps activations small enough for a
processor's cache and needs no grouped kernels. Which wins depends on sizes and machine, so it is measured:

    seconds of a micro-batch = a + b · padded tokens + c · members      a, b, c ≥ 0, fitted for each way on its own

Both ways give the same bits on one CPU process, so the choice may change at any step.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import nnls

from allele.protocol.commands import Mode

KEPT = 128
"""Newest timings of each way that count."""

ENOUGH = 4
"""Timings of a way before it is chosen by prediction."""


class CostModel:
    def __init__(self, *, max_tokens: int, padded_to: int) -> None:
        self._most, self._unit = max_tokens, padded_to
        self._seen: dict[Mode, collections.deque[tuple[int, int, float]]] = {
            "Batched": collections.deque(maxlen=KEPT),
            "OneByOne": collections.deque(maxlen=KEPT),
        }

    def note(self, *, tokens: int, members: int, seconds: float) -> None:
        """A micro-batch took so long; one of a single member says something of both ways."""
        if members == 1:
            self._seen["OneByOne"].append((self._padded(tokens), 1, seconds))
        if members > 1 or not self._seen["Batched"]:
            self._seen["Batched"].append((self._padded(tokens), members, seconds))

    def curious(self, units: Sequence[int]) -> bool:
        """Whether one unit of these should go alone only to time it: batching is all that is known."""
        return len(units) > 1 and len(self._seen["OneByOne"]) < ENOUGH

    def choose(self, units: Sequence[int]) -> Mode:
        """For units of so many tokens; Batched until both ways are known."""
        if len(units) < 2 or any(len(seen) < ENOUGH for seen in self._seen.values()):
            return "Batched"
        apart = self._predict("OneByOne", ((n, 1) for n in units))
        together = self._predict("Batched", self._filled(units))
        return "OneByOne" if apart < together else "Batched"

    def _filled(self, units: Iterable[int]) -> list[tuple[int, int]]:
        """(tokens, members) of micro-batches filled in order."""
        batches: list[tuple[int, int]] = []
        for n in units:
            tokens, members = batches[-1] if batches else (self._most, 0)
            if tokens + n > self._most:
                batches.append((n, 1))
            else:
                batches[-1] = (tokens + n, members + 1)
        return batches

    def _predict(self, mode: Mode, batches: Iterable[tuple[int, int]]) -> float:
        seen = np.array(self._seen[mode])
        features = np.column_stack([np.ones(len(seen)), seen[:, :2]])
        size = features.max(axis=0)
        weights, _ = nnls(features / size, seen[:, 2])
        wanted = np.array([(1, self._padded(n), members) for n, members in batches]) / size
        return float((wanted @ weights).sum())

    def _padded(self, tokens: int) -> int:
        return max(self._unit, -(-tokens // self._unit) * self._unit)
