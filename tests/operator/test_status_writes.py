"""The status patch turns the old status into the new one exactly, and only what cannot wait is written at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele_operator.status import merge_patch, urgent

values = st.recursive(
    st.integers(0, 3) | st.sampled_from(["a", "b"]) | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)
statuses = st.dictionaries(st.sampled_from("abcd"), values, max_size=4)


def applied(target: Any, patch: Any) -> Any:
    """RFC 7386, as the API server does it."""
    if not isinstance(patch, dict):
        return patch
    out = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = applied(out.get(key), value)
    return out


@given(statuses, statuses)
def test_the_patch_makes_the_new_status_of_the_old_one(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert applied(old, merge_patch(old, new)) == new


@given(statuses)
def test_equal_statuses_need_no_patch(status: dict[str, Any]) -> None:
    assert merge_patch(status, copy.deepcopy(status)) == {}


OLD = {
    "phase": "Training",
    "progress": {"step": 3, "steps": 40},
    "conditions": [{"type": "Training", "status": "True", "reason": "StepAdvanced", "message": "step 3 of 40"}],
}


def changed(**fields: Any) -> dict[str, Any]:
    return copy.deepcopy(OLD) | fields


CONDITION = OLD["conditions"][0]
LATER = {
    "steps": changed(progress={"step": 4, "steps": 40}),
    "a sentence": changed(conditions=[CONDITION | {"message": "step 4 of 40"}]),
    "what probes find": changed(conditions=[CONDITION, {"type": "Exposed", "status": "False", "reason": "Gap"}]),
}
NOW = {
    "the phase": changed(phase="Succeeded"),
    "a reason": changed(conditions=[CONDITION | {"reason": "Stalled"}]),
    "a condition": changed(conditions=[]),
    "a name": changed(job="run-12345678"),
    "the first reward": changed(reward={"mean": "0.5"}),
}


@pytest.mark.parametrize("new", LATER.values(), ids=LATER)
def test_numbers_that_move_on_can_wait(new: dict[str, Any]) -> None:
    assert merge_patch(OLD, new) and not urgent(OLD, new)


@pytest.mark.parametrize("new", NOW.values(), ids=NOW)
def test_what_people_wait_for_cannot(new: dict[str, Any]) -> None:
    assert urgent(OLD, new)


def test_a_new_sentence_about_why_it_waits_cannot_wait() -> None:
    def waiting(message: str) -> dict[str, Any]:
        return {"conditions": [{"type": "Ready", "status": "False", "reason": "PoolNotReady", "message": message}]}

    assert urgent(waiting("not observed yet"), waiting("image not found"))
