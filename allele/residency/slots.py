"""Slots: which adapters stay in a tier of fixed size. Pure policy, no I/O and no clock.

Least recently used goes first; what running work holds is pinned and never goes. A tier is bounded by places (an
engine's slots), by bytes (host memory, disk), or by both. When all that could go is pinned, admission is refused
whole: nothing is evicted in vain, and the caller answers with back-pressure. Loading, and that only one caller loads
a thing, are the caller's; an entry is admitted before its bytes are there.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class TierFull(Exception):
    """Everything that would have to go is pinned (or the thing is larger than the tier): wait, or answer 429."""


@dataclasses.dataclass
class _Entry:
    size: int
    pins: int = 0


class Slots(Generic[K]):
    """A tier. Every method takes time proportional to what it evicts, plus the pinned entries it passes over."""

    def __init__(self, *, places: int | None = None, capacity: int | None = None) -> None:
        """`places`: most entries; `capacity`: most bytes; at least one of them."""
        if places is None and capacity is None:
            raise ValueError("Slots: expected places or capacity, found neither: the tier would grow without bound")
        self.places = places
        self.capacity = capacity
        self._entries: OrderedDict[K, _Entry] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: K) -> bool:
        return name in self._entries

    @property
    def bytes(self) -> int:
        """Sum of sizes of what is admitted."""
        return self._bytes

    def names(self) -> list[K]:
        """From the next to go to the last used."""
        return list(self._entries)

    def pins(self, name: K) -> int:
        """How many hold it; 0 for a name that is not here."""
        entry = self._entries.get(name)
        return entry.pins if entry else 0

    def admit(self, name: K, *, size: int = 0, pin: bool = False) -> list[K]:
        """Give `name` a place and return what had to go, in order; an entry that is here is used again.

        Raises TierFull, and then nothing has changed.
        """
        entry = self._entries.get(name)
        evicted: list[K] = []
        if entry is None:
            evicted = self._room_for(size)
            for victim in evicted:
                self.remove(victim)
            entry = self._entries[name] = _Entry(size)
            self._bytes += size
        self._entries.move_to_end(name)
        entry.pins += pin
        return evicted

    def touch(self, name: K) -> bool:
        """Mark it as used now; False when it is not here."""
        if name not in self._entries:
            return False
        self._entries.move_to_end(name)
        return True

    def pin(self, name: K) -> bool:
        """Hold it until `unpin`; counts. False when it is not here."""
        if not self.touch(name):
            return False
        self._entries[name].pins += 1
        return True

    def unpin(self, name: K) -> None:
        """Raises ValueError without a matching pin: the caller's books are wrong."""
        entry = self._entries.get(name)
        if entry is None or entry.pins == 0:
            raise ValueError(f"unpin {name!r}: expected a pinned entry, found {'no pin' if entry else 'no entry'}")
        entry.pins -= 1

    def remove(self, name: K) -> bool:
        """Forget it, as after a failed load; False when it is not here. Raises ValueError while it is pinned."""
        entry = self._entries.get(name)
        if entry is None:
            return False
        if entry.pins:
            raise ValueError(f"remove {name!r}: expected no pins, found {entry.pins}")
        del self._entries[name]
        self._bytes -= entry.size
        return True

    def _room_for(self, size: int) -> list[K]:
        victims: list[K] = []
        freed = 0
        candidates = iter(self._entries.items())
        while not self._fits(size, gone=len(victims), freed=freed):
            name, entry = next(((n, e) for n, e in candidates if not e.pins), (None, None))
            if name is None or entry is None:
                raise TierFull(
                    f"expected room for {size} bytes in {self.places} places and {self.capacity} bytes, found "
                    f"{len(self._entries)} entries with {self._bytes} bytes and nothing left to evict"
                )
            victims.append(name)
            freed += entry.size
        return victims

    def _fits(self, size: int, *, gone: int, freed: int) -> bool:
        fits_places = self.places is None or len(self._entries) - gone < self.places
        return fits_places and (self.capacity is None or self._bytes - freed + size <= self.capacity)
