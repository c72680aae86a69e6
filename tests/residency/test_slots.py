"""A tier never exceeds its bounds, never evicts what is held, and evicts in order of last use."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.residency import Slots, TierFull

NAMES = st.sampled_from("abcdefgh")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), NAMES, st.integers(0, 5), st.booleans()),
        st.tuples(st.sampled_from(["touch", "pin", "unpin", "remove"]), NAMES, st.just(0), st.just(False)),
    ),
    max_size=80,
)


class Model:
    """The same policy written the slow way: a list from least to most recently used."""

    def __init__(self, places: int | None, capacity: int | None) -> None:
        self.places, self.capacity = places, capacity
        self.order: list[str] = []
        self.size: dict[str, int] = {}
        self.pins: dict[str, int] = {}

    def use(self, name: str) -> None:
        self.order.remove(name)
        self.order.append(name)

    def admit(self, name: str, size: int) -> list[str] | None:
        if name in self.size:
            self.use(name)
            return []
        kept, evicted = list(self.order), []
        while (self.places is not None and len(kept) >= self.places) or (
            self.capacity is not None and sum(self.size[n] for n in kept) + size > self.capacity
        ):
            free = [n for n in kept if not self.pins[n]]
            if not free:
                return None
            kept.remove(free[0])
            evicted.append(free[0])
        for n in evicted:
            del self.size[n], self.pins[n]
        self.order = [*kept, name]
        self.size[name], self.pins[name] = size, 0
        return evicted


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, places=st.one_of(st.none(), st.integers(1, 4)), capacity=st.integers(1, 12))
def test_slots_do_what_a_plain_list_would(
    steps: list[tuple[str, str, int, bool]], places: int | None, capacity: int
) -> None:
    slots: Slots[str] = Slots(places=places, capacity=capacity)
    model = Model(places, capacity)
    for action, name, size, pin in steps:
        if action == "admit":
            expected = model.admit(name, size)
            if expected is None:
                before = slots.names()
                with pytest.raises(TierFull):
                    slots.admit(name, size=size, pin=pin)
                assert slots.names() == before
            else:
                assert slots.admit(name, size=size, pin=pin) == expected
                model.pins[name] += pin
        elif name not in model.size:
            if action == "unpin":
                with pytest.raises(ValueError, match="no entry"):
                    slots.unpin(name)
            else:
                assert getattr(slots, action)(name) is False
        elif action == "unpin" and not model.pins[name]:
            with pytest.raises(ValueError, match="no pin"):
                slots.unpin(name)
        elif action == "remove" and model.pins[name]:
            with pytest.raises(ValueError, match="no pins"):
                slots.remove(name)
        else:
            getattr(slots, action)(name)
            if action == "remove":
                model.order.remove(name)
                del model.size[name], model.pins[name]
            elif action == "unpin":
                model.pins[name] -= 1
            else:
                model.use(name)
                model.pins[name] += action == "pin"
        assert slots.names() == model.order
        assert slots.bytes == sum(model.size.values()) <= capacity
        assert places is None or len(slots) <= places
        assert all(slots.pins(n) == p for n, p in model.pins.items())


def test_admission_is_refused_whole_when_what_is_left_is_pinned() -> None:
    slots: Slots[str] = Slots(capacity=10)
    slots.admit("old", size=4)
    slots.admit("held", size=6, pin=True)
    with pytest.raises(TierFull):
        slots.admit("large", size=5)
    assert "old" in slots


def test_a_tier_without_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="without bound"):
        Slots()
