"""Stretches never overlap, are whole pages inside the space, and nothing that is freed is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele.residency.space import PAGE, Space, pages


@given(
    capacity=st.integers(0, 40 * PAGE),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 12 * PAGE)), max_size=200),
)
def test_stretches_are_apart_and_what_is_free_is_one_hole_or_between_them(
    capacity: int, steps: list[tuple[bool, int]]
) -> None:
    space = Space(capacity)
    taken: dict[int, int] = {}
    for take, number in steps:
        if take:
            offset = space.take(number)
            holes = gaps(taken, space.capacity)
            assert (offset is None) == all(hole < pages(number) for hole in holes)
            if offset is not None:
                taken[offset] = pages(number)
        elif taken:
            offset = sorted(taken)[number % len(taken)]
            del taken[offset]
            space.give_back(offset)
        ends = 0
        for offset, size in sorted(taken.items()):
            assert offset >= ends and offset % PAGE == 0
            ends = offset + size
        assert ends <= space.capacity
    for offset in list(taken):
        space.give_back(offset)
    assert not space.capacity or space.take(space.capacity) == 0


def gaps(taken: dict[int, int], capacity: int) -> list[int]:
    found, end = [], 0
    for offset, size in [*sorted(taken.items()), (capacity, 0)]:
        found.append(offset - end)
        end = offset + size
    return [g for g in found if g]


def test_freeing_what_is_not_taken_is_refused() -> None:
    space = Space(PAGE)
    with pytest.raises(KeyError):
        space.give_back(0)
