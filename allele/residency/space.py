"""Space: stretches of one bounded file or buffer, by offset. Pure book-keeping.

Best fit, neighbours joined when freed. Adapters of one shape have one size, so that holes fit exactly; with several
sizes free bytes may lie in holes that are all too small, and the caller frees something more.
"""

from __future__ import annotations

import bisect

PAGE = 4096
"""Bytes; offsets and sizes are multiples of it, so that no two stretches share a page."""


class Space:
    """Stretches of `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // PAGE * PAGE
        self._holes: list[tuple[int, int]] = []
        """(offset, length), sorted; never two that touch."""
        self._by_length: list[tuple[int, int]] = []
        """(length, offset) of the same."""
        self._taken: dict[int, int] = {}
        if self.capacity:
            self._add(0, self.capacity)

    def take(self, size: int) -> int | None:
        """Offset of a stretch of at least `size` bytes; None when no hole is large enough."""
        size = pages(size)
        at = bisect.bisect_left(self._by_length, (size, 0))
        if at == len(self._by_length):
            return None
        length, offset = self._by_length[at]
        self._remove(offset, length)
        if length > size:
            self._add(offset + size, length - size)
        self._taken[offset] = size
        return offset

    def give_back(self, offset: int) -> None:
        """Raises KeyError for an offset that is not taken."""
        begin, end = offset, offset + self._taken.pop(offset)
        at = bisect.bisect_left(self._holes, (offset, 0))
        for neighbour in self._holes[max(0, at - 1) : at + 1]:
            if neighbour[0] == end or sum(neighbour) == begin:
                self._remove(*neighbour)
                begin, end = min(begin, neighbour[0]), max(end, sum(neighbour))
        self._add(begin, end - begin)

    def _add(self, offset: int, length: int) -> None:
        bisect.insort(self._holes, (offset, length))
        bisect.insort(self._by_length, (length, offset))

    def _remove(self, offset: int, length: int) -> None:
        del self._holes[bisect.bisect_left(self._holes, (offset, length))]
        del self._by_length[bisect.bisect_left(self._by_length, (length, offset))]


def pages(size: int) -> int:
    """`size` rounded up to whole pages; at least one."""
    return max(1, -(-size // PAGE)) * PAGE
