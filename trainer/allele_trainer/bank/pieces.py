"""Arithmetic of slices of a row: which elements train, which count towards a norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Pieces = tuple[slice, ...]
"""Ascending slices `start..stop` of elements that do not overlap."""


def complement(pieces: Iterable[slice], size: int) -> Pieces:
    """What is left of a row of `size` elements without `pieces`, which may come in any order."""
    left: list[slice] = []
    at = 0
    for piece in sorted(pieces, key=lambda p: p.start):
        if piece.start > at:
            left.append(slice(at, piece.start))
        at = max(at, piece.stop)
    return (*left, slice(at, size)) if at < size else tuple(left)


def overlap(one: Sequence[slice], other: Sequence[slice]) -> Pieces:
    """Elements in both."""
    found: list[slice] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, stop = max(one[i].start, other[j].start), min(one[i].stop, other[j].stop)
        if start < stop:
            found.append(slice(start, stop))
        if one[i].stop <= other[j].stop:
            i += 1
        else:
            j += 1
    return tuple(found)
