"""A member whose gradient is not finite keeps its row; the others never notice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from tests.trainer.trainer_parts import Example, Rig, adapter, examples, same_rows, start

MEMBERS = ["a", "sick", "b"]
STEPS = [examples(MEMBERS, each=3, vocab=96, seed=s) for s in range(3)]


def spoiled(e: Example, field: str, value: float) -> Example:
    return dataclasses.replace(e, **{field: value if field == "advantage" else [value, *e.logprobs[1:]]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["advantage", "logprobs"])
def test_only_the_members_own_step_is_skipped(rig: Callable[..., Rig], field: str, value: float) -> None:
    spoil = len(STEPS) - 2
    sick, healthy = rig(slots=3), rig(slots=3)
    for mine in (sick, healthy):
        mine.reset([start(m, adapter(), seed=i) for i, m in enumerate(MEMBERS)])
    for step, found in enumerate(STEPS):
        healthy.step(found)
        before = sick.row("sick")
        first = next(i for i, e in enumerate(found) if e.member == "sick")
        given = [spoiled(e, field, value) if step == spoil and i == first else e for i, e in enumerate(found)]
        updates = sick.step(given)
        assert {m: u.skipped for m, u in updates.items()} == {"a": False, "sick": step == spoil, "b": False}
        assert same_rows(sick.row("sick"), before) == (step == spoil)
    assert all(same_rows(sick.row(m), healthy.row(m)) for m in ("a", "b"))
    assert sick.row("sick").step == len(STEPS) - 1 and sick.row("sick").weights.isfinite().all()
