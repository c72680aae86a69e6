"""Rows that start an adapter: by its initialisation, from exported weights, or from a saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from allele.format import AdapterShape, ShapeMismatch, StateShape
from allele.protocol.commands import ByteRange, MemberStart
from allele.protocol.errors import DigestMismatch, InvalidRequest
from allele_trainer.bank.rows import Row


class Segments(Protocol):
    """The part of `allele.store.PopulationStore` that a start needs."""

    def read(self, where: ByteRange) -> bytes: ...

    def read_many(self, where: Sequence[ByteRange]) -> Sequence[bytes]: ...


class Starts:
    """First rows of the members of one run that share a shape."""

    def __init__(self, store: Segments, shape: AdapterShape, given: Callable[[MemberStart], Tensor | None]) -> None:
        """`given`: the weights `[P]` that a member's initialisation takes from the base, None of one by seed."""
        self._given = given
        self._store, self._shape, self._state = store, shape, StateShape(shape)
        self._members: dict[str, MemberStart] = {}

    def add(self, start: MemberStart) -> None:
        self._members[start.member] = start

    def moved(self, member: str, state: ByteRange) -> None:
        """From now on the member starts from this state."""
        self._members[member] = self._members[member].model_copy(update={"state": state, "weights": None})

    def rows(self, members: Sequence[str]) -> list[Row]:
        """Read or make them. Raises DigestMismatch or InvalidRequest naming the member whose bytes are wrong."""
        starts = [self._members[m] for m in members]
        stored = [s for s in starts if s.state or s.weights]
        data = dict(zip((s.member for s in stored), self._read(stored), strict=True))
        return [self._row(s, data[s.member]) if s.member in data else self._first(s) for s in starts]

    def _first(self, start: MemberStart) -> Row:
        weights = self._given(start)
        return initial(self._shape, seed=start.seed) if weights is None else fresh(weights)

    def _read(self, starts: Sequence[MemberStart]) -> Sequence[bytes]:
        ranges = [r for s in starts if (r := s.state or s.weights)]
        try:
            return self._store.read_many(ranges) if ranges else []
        except DigestMismatch:
            for start, where in zip(starts, ranges, strict=True):
                try:
                    self._store.read(where)
                except DigestMismatch as e:
                    raise DigestMismatch(f"member {start.member}: {e}") from e
            raise

    def _row(self, start: MemberStart, data: bytes) -> Row:
        try:
            if start.state is None:
                return fresh(from_bytes(self._shape.unpack(data)))
            state = self._state.unpack(data)
        except ShapeMismatch as e:
            raise InvalidRequest(f"member {start.member}: {e}") from e
        weights, moment, square = (torch.from_numpy(a.copy()) for a in (state.weights, state.exp_avg, state.exp_avg_sq))
        return Row(weights, moment, square, step=state.step)


def initial(shape: AdapterShape, *, seed: int) -> Row:
    """PEFT's default: A kaiming-uniform with a = √5, i.e. U(−1/√in, 1/√in), and B zero.

    Depends on the shape and the seed alone, whatever slot, device or cohort the member lands in.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(shape.numel)
    for tensor in shape.tensors:
        if ".lora_A." in tensor.name:
            bound = 1 / math.sqrt(tensor.shape[1])
            weights[tensor.offset : tensor.offset + tensor.numel].uniform_(-bound, bound, generator=generator)
    return fresh(weights)


def fresh(weights: Tensor) -> Row:
    """A row with these weights `[P]` and an optimizer that has made no step."""
    return Row(weights, torch.zeros_like(weights), torch.zeros_like(weights))


def from_bytes(data: memoryview | bytes) -> Tensor:
    """fp32 elements → a tensor of its own."""
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").copy())
