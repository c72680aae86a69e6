"""Who trains when: pure.

A step trains a cohort; a cohort that is larger than what the trainer steps at a time is trained in waves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def cohort(members: Sequence[T], *, step: int, size: int | None) -> tuple[T, ...]:
    """Members of step 1, 2, …: all of them, or `size` by round robin, so that turns differ by at most one."""
    if size is None or size >= len(members):
        return tuple(members)
    first = (step - 1) * size % len(members)
    return tuple(members[(first + k) % len(members)] for k in range(size))


def waves(members: Sequence[T], *, size: int) -> Iterator[tuple[tuple[T, ...], tuple[T, ...]]]:
    """Parts of at most `size` members, in order, each with the one that follows it."""
    for start in range(0, len(members), size):
        end = start + size
        yield tuple(members[start:end]), tuple(members[end : end + size])


def turns(place: int, *, members: int, step: int, size: int | None) -> int:
    """How many of the steps 1 to `step` have the member at `place` in their cohort."""
    if size is None or size >= members:
        return step
    drawn = step * size
    return drawn // members + (1 if place < drawn % members else 0)


def saves_state(place: int, *, members: int, step: int, steps: int, size: int | None, every: int) -> bool:
    """Whether a member that trains in `step` saves its state: at each `every`-th turn of its own, and at its last."""
    turn = turns(place, members=members, step=step, size=size)
    return turn % every == 0 or turn == turns(place, members=members, step=steps, size=size)
