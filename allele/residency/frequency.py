"""How often names were used lately, in bounded memory, whether or not they are kept: a count-min sketch that ages.

A tier asks it which of two names is used more. Counts outlive eviction, so a name that comes back is known. Two names
may share cells, and then look more used than they are, never less. When enough uses were counted all counts are
halved: what was popular yesterday gives way.

The published rule (TinyLFU, arXiv 1512.00727; Caffeine and moka follow it) halves every 10 uses an entry. Catalogues
of adapters have longer tails than what those caches hold: at Zipf 1.0 over a million, what just deserves a place among
64 is used once in 900 requests, so ten uses an entry count it about once. `docs/serving.md` has what a longer PERIOD
gains while popularity stands still, and what it costs when it moves.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Hashable

ROWS = 4
CELLS = 16
"""Cells of a row for each entry of the tier, so that the tail seldom collides with what is kept."""
LEAST = 1024
"""Cells of the smallest row."""
PERIOD = 32
"""Uses an entry between two halvings."""
TOP = 15
"""Highest count: enough to order what competes for the last places, small enough to be forgotten in four halvings."""
_HALF = bytes(n // 2 for n in range(256))

Key = tuple[int, int, int, int]
"""A name's place in each row, before it is cut to the row's length."""


def key(name: Hashable) -> Key:
    """Equal for equal names in every process: `hash` is not, for text."""
    found: Key = struct.unpack("<4I", hashlib.blake2b(repr(name).encode(), digest_size=16).digest())
    return found


class Frequency:
    """Counts for a tier of about `entries`; memory is 64 bytes an entry."""

    def __init__(self, entries: int) -> None:
        width = LEAST
        while width < entries * CELLS:
            width *= 2
        self._rows = [bytearray(width) for _ in range(ROWS)]
        self._mask = width - 1
        self._entries = max(entries, LEAST // CELLS)
        self._counted = 0

    def count(self, key: Key) -> None:
        """One use. Only the smallest of its cells grow, so that a shared cell hides less."""
        least = self.estimate(key)
        if least < TOP:
            for row, place in zip(self._rows, key, strict=True):
                if row[place & self._mask] == least:
                    row[place & self._mask] = least + 1
        self._counted += 1
        if self._counted >= PERIOD * self._entries:
            self._rows = [row.translate(_HALF) for row in self._rows]
            self._counted //= 2

    def estimate(self, key: Key) -> int:
        """Uses lately, at most TOP."""
        mask = self._mask
        first, second, third, fourth = self._rows
        a, b, c, d = key
        return min(first[a & mask], second[b & mask], third[c & mask], fourth[d & mask])

    def inherit(self, heir: Key, key: Key) -> None:
        """Count for `heir` at least what is counted for `key`."""
        count = self.estimate(key)
        for row, place in zip(self._rows, heir, strict=True):
            row[place & self._mask] = max(row[place & self._mask], count)

    def grow(self, entries: int) -> None:
        """Serve a tier of so many. A row laid out twice in a row has every count where its name looks for it."""
        self._entries = max(self._entries, entries)
        while self._mask + 1 < entries * CELLS:
            self._rows = [row + row for row in self._rows]
            self._mask = 2 * self._mask + 1
