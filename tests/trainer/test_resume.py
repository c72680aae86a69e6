"""Saved state resumes exactly; weights alone start a fresh optimizer; wrong bytes are refused by name."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch

from allele.protocol.errors import DigestMismatch, InvalidRequest, NotFound
from tests.trainer.trainer_parts import Rig, adapter, examples, same_rows, start

MEMBERS = ["a", "b", "c"]
STEPS = [examples(MEMBERS, each=3, vocab=96, seed=s) for s in range(5)]


@pytest.fixture
def halfway(rig: Callable[..., Rig]) -> Rig:
    mine = rig(slots=2)
    mine.reset([start(m, adapter(), seed=i) for i, m in enumerate(MEMBERS)])
    for found in STEPS[:3]:
        mine.step(found, wave=2)
    return mine


def test_resumed_from_state_the_next_steps_have_the_same_bits(halfway: Rig, rig: Callable[..., Rig]) -> None:
    states = halfway.save(*MEMBERS)
    resumed = rig(slots=3)
    resumed.reset([start(m, adapter(), seed=9, state=states[m]) for m in MEMBERS])
    for found in STEPS[3:]:
        halfway.step(found, wave=2)
        resumed.step(found)
    assert all(same_rows(halfway.row(m), resumed.row(m)) for m in MEMBERS)
    assert resumed.row("a").step == 5


def test_reset_forgets_what_was_in_memory(halfway: Rig) -> None:
    states = halfway.save(*MEMBERS)
    saved = {m: halfway.row(m) for m in MEMBERS}
    halfway.step(STEPS[3], wave=2)
    halfway.admit("a")
    halfway.forward_backward([e for e in STEPS[4] if e.member == "a"])
    halfway.reset([start(m, adapter(), state=states[m]) for m in MEMBERS])
    assert halfway.trainer.used == 0
    halfway.admit("a", "b")
    assert all(same_rows(halfway.row(m), saved[m]) for m in MEMBERS)
    with pytest.raises(InvalidRequest, match=r"expected members with a gradient.*'a'"):
        halfway.optim_step({"a": 1e-3})


def test_weights_alone_start_a_fresh_optimizer(halfway: Rig) -> None:
    weights = halfway.export("a").weights["a"]
    before = halfway.row("a").weights.clone()
    halfway.reset([start("a", adapter(), weights=weights)])
    halfway.admit("a")
    row = halfway.row("a")
    assert torch.equal(row.weights, before) and row.step == 0
    assert not row.exp_avg.any() and not row.exp_avg_sq.any()


def test_damaged_state_is_refused_by_member_and_nothing_is_loaded(halfway: Rig, tmp_path: pathlib.Path) -> None:
    states = halfway.save(*MEMBERS)
    (path,) = (tmp_path / "store").rglob(pathlib.Path(states["b"].path).name)
    data = bytearray(path.read_bytes())
    data[states["b"].offset + states["b"].length // 2] ^= 1
    path.write_bytes(data)
    halfway.reset([start(m, adapter(), state=states[m]) for m in MEMBERS])
    with pytest.raises(DigestMismatch, match=r"member b: .*expected sha256"):
        halfway.admit("a", "b")
    assert halfway.trainer.used == 0
    halfway.admit("a", "c")


def test_bytes_of_another_shape_are_refused_by_member_and_tensor(halfway: Rig) -> None:
    weights = halfway.export("a").weights["a"]
    halfway.reset([start("a", adapter(rank=4), weights=weights)])
    with pytest.raises(InvalidRequest, match=r"member a: .*expected.*found"):
        halfway.admit("a")


def test_missing_segment_is_not_found(halfway: Rig) -> None:
    weights = halfway.export("a").weights["a"].model_copy(update={"path": "segments/none.seg"})
    halfway.reset([start("a", adapter(), weights=weights)])
    with pytest.raises(NotFound, match=r"none\.seg"):
        halfway.admit("a")
