"""A tier: which adapters stay in a place of fixed size. Pure policy, no I/O and no clock.

A tier is bounded by places (an engine's slots), by bytes (host memory, disk), or by both. What running work holds is
pinned and never goes. When all that could go is pinned, admission is refused whole: nothing is evicted in vain, and
the caller answers with back-pressure. Loading, and that only one caller loads a thing, are the caller's; an entry is
admitted before its bytes are there.

Who goes (W-TinyLFU: Einziger, Friedman, Manes, arXiv 1512.00727):

    admit ─► window ──── oldest ────► probation ◄── pushed out ── protected
             newcomers   of idle      in main, once   ── used ──►  used again there

A request needs its adapter, so a newcomer is always let in, but only into the window, a hundredth of the tier. When
room is needed, the window's oldest competes with the one that main would give up first, and the one that was used
less often lately leaves. Newcomers that nobody asks for again push out one another, and not what is hot.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from allele.residency.frequency import Frequency, Key, key

K = TypeVar("K", bound=Hashable)

WINDOW = 0.01
"""Share of a tier's entries that newcomers have without competing; one at least."""
PROTECTED = 0.8
"""Share of main for what was used again there."""


class TierFull(Exception):
    """Everything that would have to go is pinned (or the thing is larger than the tier): wait, or answer 429."""


_Idle = OrderedDict[K, "_Entry[K]"]
"""Entries that nobody holds, from the least to the most recently used."""


@dataclasses.dataclass(slots=True)
class _Entry(Generic[K]):
    size: int
    key: Key
    region: _Idle[K]
    """Where it lies when nobody holds it."""
    pins: int = 0


class Tier(Generic[K]):
    """Every method takes constant time; `admit` that for each entry it evicts."""

    def __init__(self, *, places: int | None = None, capacity: int | None = None) -> None:
        """`places`: most entries; `capacity`: most bytes; at least one of them."""
        if places is None and capacity is None:
            raise ValueError("Tier: expected places or capacity, found neither: the tier would grow without bound")
        self.places = places
        self.capacity = capacity
        self._frequency = Frequency(places or 0)
        self._entries: dict[K, _Entry[K]] = {}
        self._superseded: _Idle[K] = OrderedDict()
        self._window: _Idle[K] = OrderedDict()
        self._probation: _Idle[K] = OrderedDict()
        self._protected: _Idle[K] = OrderedDict()
        self._bytes = 0
        self._held = 0
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: K) -> bool:
        return name in self._entries

    @property
    def bytes(self) -> int:
        """Sum of sizes of what is admitted."""
        return self._bytes

    def names(self) -> list[K]:
        """What was superseded, probation, window, protected, what is held; the least recently used of each first."""
        idle = [n for region in (self._superseded, self._probation, self._window, self._protected) for n in region]
        return idle + [n for n, e in self._entries.items() if e.pins]

    def pins(self, name: K) -> int:
        """How many hold it; 0 for a name that is not here."""
        entry = self._entries.get(name)
        return entry.pins if entry else 0

    def admit(self, name: K, *, size: int = 0, pin: bool = False) -> list[K]:
        """Give `name` a place and return what had to go, in order; an entry that is here is used again.

        Raises TierFull, and then nothing has changed.
        """
        if name in self._entries:
            self._use(name, pin=pin)
            return []
        if not self._fits(size, held=True):
            raise TierFull(
                f"expected room for {size} bytes in {self.places} places and {self.capacity} bytes, found "
                f"{self._held} entries with {self._held_bytes} bytes in use, which stay"
            )
        evicted: list[K] = []
        while not self._fits(size) and (victim := self.victim()) is not None:
            self.remove(victim)
            evicted.append(victim)
        entry = self._entries[name] = _Entry(size, key(name), self._window)
        self._bytes += size
        self._frequency.grow(len(self._entries))
        self._frequency.count(entry.key)
        self._window[name] = entry
        if pin:
            self._hold(name, entry)
        self._settle()
        return evicted

    def touch(self, name: K) -> bool:
        """Mark it as used now; False when it is not here."""
        return self._use(name, pin=False)

    def pin(self, name: K, *, use: bool = True) -> bool:
        """Hold it until `unpin`; counts, and is a use unless that was counted already. False when it is not here."""
        if use:
            return self._use(name, pin=True)
        if (entry := self._entries.get(name)) is not None:
            self._hold(name, entry)
        return entry is not None

    def unpin(self, name: K) -> None:
        """Raises ValueError without a matching pin: the caller's books are wrong."""
        entry = self._entries.get(name)
        if entry is None or entry.pins == 0:
            raise ValueError(f"unpin {name!r}: expected a pinned entry, found {'no pin' if entry else 'no entry'}")
        entry.pins -= 1
        if not entry.pins:
            self._held -= 1
            self._held_bytes -= entry.size
            entry.region[name] = entry
            self._settle()

    def remove(self, name: K) -> bool:
        """Forget it, as after a failed load; False when it is not here. Raises ValueError while it is pinned."""
        entry = self._entries.get(name)
        if entry is None:
            return False
        if entry.pins:
            raise ValueError(f"remove {name!r}: expected no pins, found {entry.pins}")
        del self._entries[name], entry.region[name]
        self._bytes -= entry.size
        return True

    def victim(self) -> K | None:
        """Who would go next, None when all are held. Who needs one large hole removes them one by one until it fits."""
        if self._superseded:
            return next(iter(self._superseded))
        newcomer = next(iter(self._window.items()), None)
        settled = next(iter((self._probation or self._protected).items()), None)
        if newcomer is None or settled is None:
            found = newcomer or settled
            return found[0] if found else None
        if self._frequency.estimate(newcomer[1].key) > self._frequency.estimate(settled[1].key):
            return settled[0]
        return newcomer[0]

    def supersede(self, name: K, by: K) -> None:
        """`by` is the next revision of `name`: it inherits its uses; `name` is the first to go unless used again.

        Without this the new revisions of hot members would count as never used, and lose against the old ones, which
        nobody asks for any more, until these are forgotten.
        """
        self._frequency.inherit(key(by), key(name))
        entry = self._entries.get(name)
        if entry is not None:
            entry.region.pop(name, None)
            entry.region = self._superseded
            if not entry.pins:
                self._superseded[name] = entry

    def _use(self, name: K, *, pin: bool) -> bool:
        entry = self._entries.get(name)
        if entry is None:
            return False
        self._frequency.count(entry.key)
        region = entry.region
        if region is self._probation:
            entry.region = self._protected
        elif region is self._superseded:
            entry.region = self._window
        if not entry.pins:
            del region[name]
            entry.region[name] = entry
        if pin:
            self._hold(name, entry)
        self._settle()
        return True

    def _hold(self, name: K, entry: _Entry[K]) -> None:
        if not entry.pins:
            del entry.region[name]
            self._held += 1
            self._held_bytes += entry.size
        entry.pins += 1

    def _settle(self) -> None:
        """Bring window and protected back to their shares."""
        most = max(1, int(WINDOW * len(self._entries)))
        while len(self._window) > most:
            self._move(self._window, self._probation)
        most = int(PROTECTED * (len(self._probation) + len(self._protected)))
        while len(self._protected) > most:
            self._move(self._protected, self._probation)

    def _move(self, source: _Idle[K], to: _Idle[K]) -> None:
        name, entry = source.popitem(last=False)
        entry.region = to
        to[name] = entry

    def _fits(self, size: int, *, held: bool = False) -> bool:
        """Whether one more has room beside what is here; `held`: beside what cannot go."""
        entries, used = (self._held, self._held_bytes) if held else (len(self._entries), self._bytes)
        fits_places = self.places is None or entries < self.places
        return fits_places and (self.capacity is None or used + size <= self.capacity)
