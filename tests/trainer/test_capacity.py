"""How many slots fit is found by filling them, and said with its reason."""

from __future__ import annotations

import pytest
import torch

from allele_trainer.__main__ import arguments, limits_of
from allele_trainer.model.build import BaseModel
from allele_trainer.server import capacity
from allele_trainer.server.capacity import MOST, NoRoom, probe

MIB = 1 << 20


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda: nbytes)


def test_with_room_for_all_the_most_is_made(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 4 << 30)
    found = probe(model, max_rank=1, max_tokens=256)
    assert (found.slots, found.wave) == (MOST, MOST)
    assert f"auto: {MOST} slots, the most that auto makes" in found.reason and "of 2.0 GiB (50%" in found.reason


def test_slots_and_a_step_stay_within_their_part_of_the_memory(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 200 * MIB)
    small = probe(model, max_rank=8, max_tokens=512)
    free(monkeypatch, 400 * MIB)
    large = probe(model, max_rank=8, max_tokens=512)
    shape_bytes = capacity._Try(
        model, capacity.AdapterShape.from_model(model.config.raw, rank=8, targets=capacity.TARGETS), max_tokens=512
    ).bytes_of
    assert 1 < small.slots < large.slots < MOST
    assert shape_bytes(small.slots) <= 100 * MIB < shape_bytes(large.slots) <= 200 * MIB
    assert "the most that fit" in small.reason


def test_a_try_that_does_not_fit_is_followed_by_one_with_fewer_slots(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that has less than it said: beyond 20 slots its allocator refuses."""
    free(monkeypatch, 64 * MIB)
    real = capacity._Try._bank

    def refusing(self: capacity._Try, slots: int) -> object:
        if slots > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, slots)

    monkeypatch.setattr(capacity._Try, "_bank", refusing)
    found = probe(model, max_rank=8, max_tokens=64)
    assert 16 <= found.slots <= 20


def test_without_room_for_one_the_trainer_says_what_it_would_take(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 300_000)
    with pytest.raises(NoRoom, match=r"expected .* for an adapter of rank 16 and .* for a step .* found 146\.5 KiB"):
        probe(model, max_rank=16, max_tokens=64)


def test_the_command_line_takes_auto_or_a_number(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(*more: str) -> object:
        required = ("--base", "b", "--base-digest", "d", "--store", "s", "--max-rank", "8", "--max-tokens", "128")
        return limits_of(arguments().parse_args([*required, *more]), model)

    free(monkeypatch, 128 * MIB)
    given = limits("--slots", "24", "--wave", "8", "--host-memory", "1000")
    assert (given.slots, given.wave, given.host_memory, given.reason) == (24, 8, 1000, "given")
    found = limits("--slots", "auto")
    assert found.slots > 1 and found.reason.startswith("auto: ")
    with pytest.raises(SystemExit):
        limits("--slots", "none")
