"""Samples → packed micro-batches, as arrays.

A member's bits must not depend on who shares its batch, so every choice here depends on the member alone: its sequences
are split into units by its own tokens, a micro-batch never holds two units of one owner, sequences meet attention at a
width that follows from their own length, and the whole batch is padded to a multiple of 64 tokens (GEMM kernels for few
rows give other bits; the rows themselves do not change each other).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from allele_trainer.rl.goals import Goal

PAD = 64
"""Batches and logit rows are padded to a multiple of this."""

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence of one owner (`allele_trainer.bank.banks`).

    `goal`: what it is trained towards; None where only its logprobs are wanted.

    `pair`: it and its neighbour with the same number stay together.
    """

    owner: int
    prompt: Sequence[int]
    completion: Sequence[int]
    goal: Goal | None = None
    pair: int | None = None
    experts: npt.NDArray[np.int16] | None = None
    """`[inputs, layers, k]` that the rollout chose; −1 where the router is to choose."""

    @property
    def inputs(self) -> int:
        """Tokens that go into the model: the last one is only a target."""
        return len(self.prompt) + len(self.completion) - 1


@dataclasses.dataclass(frozen=True)
class AttentionBucket:
    width: int
    gather: Ints


@dataclasses.dataclass(frozen=True)
class Packed:
    """T tokens (padded), R logit rows (padded), n ≤ R targets; sequences ordered by owner."""

    tokens: Ints
    positions: Ints
    longest: int
    counts: tuple[tuple[int, int], ...]
    """(owner, tokens), ascending."""
    buckets: tuple[AttentionBucket, ...]
    scatter: Ints
    rows: Ints
    targets: Ints
    """`[n]`"""
    owners: Ints
    """`[n]` owner of each target."""
    samples: tuple[Sample, ...]
    """In the order of their targets."""
    routing: npt.NDArray[np.int16] | None
    """`[layers, T, k]` experts, −1 where the router chooses; None when it chooses everywhere."""
    unknown: npt.NDArray[np.bool_] | None
    """`[n]` targets predicted from a token whose experts in the rollout are not known: their loss does not count. None
    where there is no such."""


def width(length: int) -> int:
    """Attention width of a sequence, in steps that grow: little padding, few kernels, and vector registers that are
    full (a width of 31 takes twice the time of 32)."""
    step = 8 if length <= 64 else 16 if length <= 256 else 64
    return -(-length // step) * step


def micro_batches(samples: Iterable[Sample], *, max_tokens: int) -> list[list[Sample]]:
    """Split samples into micro-batches of at most `max_tokens` input tokens (one longer sequence goes alone).

    Order of a owner's samples is kept. Each owner's share of a micro-batch is the same whoever else is there.
    """
    by_owner: dict[int, list[Sample]] = {}
    for sample in samples:
        by_owner.setdefault(sample.owner, []).append(sample)
    rounds: list[list[list[Sample]]] = []
    for owner in sorted(by_owner):
        for i, unit in enumerate(units_of(by_owner[owner], max_tokens=max_tokens)):
            if i == len(rounds):
                rounds.append([])
            rounds[i].append(unit)
    batches: list[list[Sample]] = []
    for round_ in rounds:
        room = 0
        for unit in round_:
            size = sum(s.inputs for s in unit)
            if size > room:
                batches.append([])
                room = max_tokens
            batches[-1].extend(unit)
            room -= size
    return batches


class Sized(Protocol):
    @property
    def inputs(self) -> int:
        """Tokens that go into the model."""

    @property
    def pair(self) -> int | None:
        """The same for two neighbours that one micro-batch must hold."""


S = TypeVar("S", bound=Sized)


def units_of(samples: Sequence[S], *, max_tokens: int) -> list[list[S]]:
    """A member's sequences, in order, in parts of at most `max_tokens` input tokens, or of one longer sequence or pair.

    Gradients of a unit are summed by the GEMM, those of units one after the other: which sequences share one decides
    bits, so it follows from the member's own sequences alone.
    """
    units: list[list[S]] = [[]]
    size = 0
    for whole in together(samples):
        more = sum(s.inputs for s in whole)
        if units[-1] and size + more > max_tokens:
            units.append([])
            size = 0
        units[-1].extend(whole)
        size += more
    return units


def together(samples: Sequence[S]) -> list[Sequence[S]]:
    """One sequence, or the two of a pair, at a time."""
    found: list[Sequence[S]] = []
    i = 0
    while i < len(samples):
        n = 1 if samples[i].pair is None else 2
        found.append(samples[i : i + n])
        i += n
    return found


def pack(samples: Sequence[Sample]) -> Packed:
    """One micro-batch; samples in ascending order of owner. Without samples, padding alone."""
    lengths = np.array([s.inputs for s in samples], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    size = _padded(total)
    tokens, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    tokens[:total] = np.fromiter(
        itertools.chain.from_iterable((*s.prompt, *s.completion[:-1]) for s in samples), np.int64, total
    )
    positions[:total] = np.arange(total) - np.repeat(starts[:-1], lengths)
    buckets, scatter = _buckets(lengths, starts, size)
    answers = np.array([len(s.completion) for s in samples], np.int64)
    first = starts[1:] - answers
    rows = np.arange(int(answers.sum())) - np.repeat(np.cumsum(answers) - answers, answers) + np.repeat(first, answers)
    owners = np.array([s.owner for s in samples], np.int64)
    counts: dict[int, int] = {}
    for owner, length in zip(owners.tolist(), lengths.tolist(), strict=True):
        counts[owner] = counts.get(owner, 0) + length
    return Packed(
        tokens=tokens,
        positions=positions,
        longest=int(lengths.max(initial=1)),
        counts=tuple(counts.items()),
        buckets=buckets,
        scatter=scatter,
        rows=np.concatenate([rows, np.zeros(_padded(rows.size) - rows.size, np.int64)]),
        targets=np.fromiter(itertools.chain.from_iterable(s.completion for s in samples), np.int64),
        owners=np.repeat(owners, answers),
        samples=tuple(samples),
        routing=_routing(samples, size),
        unknown=_unknown(samples),
    )


def _routing(samples: Sequence[Sample], size: int) -> npt.NDArray[np.int16] | None:
    """Padding goes to the first experts: any choice will do, but one expert twice would not."""
    given = next((s.experts for s in samples if s.experts is not None), None)
    if given is None:
        return None
    _, layers, k = given.shape
    unknown = np.full((1, layers, k), -1, np.int16)
    parts = [np.repeat(unknown, s.inputs, axis=0) if s.experts is None else s.experts for s in samples]
    rest = size - sum(s.inputs for s in samples)
    padding = np.broadcast_to(np.arange(k, dtype=np.int16), (rest, layers, k))
    return np.ascontiguousarray(np.concatenate([*parts, padding]).transpose(1, 0, 2))


def _unknown(samples: Sequence[Sample]) -> npt.NDArray[np.bool_] | None:
    """Per completion token."""
    if all(s.experts is None for s in samples):
        return None
    parts = []
    for sample in samples:
        n = len(sample.completion)
        lowest = np.zeros(n) if sample.experts is None else sample.experts[-n:].reshape(n, -1).min(axis=1)
        parts.append(lowest < 0)
    found = np.concatenate(parts)
    return found if found.any() else None


def _buckets(lengths: Ints, starts: Ints, size: int) -> tuple[tuple[AttentionBucket, ...], Ints]:
    """Gather indices of each width, and where each token comes back from; `size` and the last row mean zero.

    Without sequences a bucket of zeros: a rank with padding alone takes part in the others' collectives.
    """
    if not lengths.size:
        return (AttentionBucket(1, np.array([size])),), np.full(size, 1)
    widths = np.array([width(n) for n in lengths.tolist()], np.int64)
    buckets: list[AttentionBucket] = []
    place = np.zeros(lengths.size, np.int64)
    offset = 0
    for w in np.unique(widths).tolist():
        members = np.flatnonzero(widths == w)
        column = np.arange(w)
        gather = np.where(column < lengths[members, None], starts[members, None] + column, size)
        buckets.append(AttentionBucket(w, gather.ravel()))
        place[members] = offset + np.arange(members.size) * w
        offset += members.size * w
    scatter = np.full(size, offset)
    total = int(starts[-1])
    scatter[:total] = np.arange(total) + np.repeat(place - starts[:-1], lengths)
    return tuple(buckets), scatter


def _padded(n: int) -> int:
    return max(PAD, -(-n // PAD) * PAD)
