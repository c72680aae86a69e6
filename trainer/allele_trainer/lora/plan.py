"""Which tokens of a packed batch belong to which rows of which banks.

The plan travels with its micro-batch (`allele_trainer.model.batch.PackedBatch`) and is entered again by each layer:
activation recompute and pipelining run a layer later than its neighbours, and with a global plan they would apply
another micro-batch's routing (measured: gradients off by a factor of two, without an error).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import Bank

Counts = Sequence[tuple[int, int]]
"""(slot, or owner, and its tokens), in ascending order."""

MOST_GROUPS = 1023
"""torch's grouped kernel on CUDA takes no more."""

_GAP = 16
"""Slots without tokens that a part may step over: a group costs something even when it is empty."""

_RUN = 8
"""Slots with equally many tokens, one behind the other, that are worth a kernel of their own."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens `begin..end` of a batch, ordered by slot, for the rows `first..last-1` of one bank.

    What only some kernels read is made when the first of them asks.
    """

    bank: Bank
    begin: int
    spans: tuple[tuple[int, int, int], ...]
    """(slot, first token, end) of each slot with tokens, counted from `begin`."""
    rows: tuple[int, ...]
    """Gradient row of each of them."""
    each: int | None
    """Tokens of every slot `first..last-1`, when they are equally many."""
    versions: tuple[tuple[int, int], ...]
    """(slot, its version) when the plan was made, after `stores` stores."""
    stores: int

    @functools.cached_property
    def first(self) -> int:
        return self.spans[0][0]

    @functools.cached_property
    def last(self) -> int:
        return self.spans[-1][0] + 1

    @functools.cached_property
    def end(self) -> int:
        return self.begin + self.spans[-1][2]

    @functools.cached_property
    def offsets(self) -> Tensor:
        """End of each group of slots `first..last-1`, empty ones included: for reads that take a slice of the bank."""
        return self._counts.cumsum(0, dtype=torch.int32).to(self.bank.device)

    @functools.cached_property
    def active_offsets(self) -> Tensor:
        """End of each group of slots with tokens."""
        return torch.tensor([end for _, _, end in self.spans], dtype=torch.int32).to(self.bank.device)

    @functools.cached_property
    def active(self) -> slice | Tensor:
        """The gradient rows, to index G."""
        rows = self.rows
        if rows == tuple(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        return torch.tensor(rows).to(self.bank.device)

    @functools.cached_property
    def scale(self) -> Tensor:
        """`[tokens, 1]`, or `[1]` for all: the factor on B·A·x of each token's adapter."""
        of_slots = self.bank.scale[self.first : self.last]
        if len(self.spans) == 1:
            return of_slots
        return of_slots.repeat_interleave(self._counts.to(self.bank.device), output_size=self.spans[-1][2])[:, None]

    @property
    def _counts(self) -> Tensor:
        """Tokens of each slot `first..last-1`."""
        slots, begins, ends = torch.tensor(self.spans).unbind(1)
        return torch.zeros(self.last - self.first, dtype=torch.int64).index_put((slots - self.first,), ends - begins)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens outside of all parts are padding, or have no adapter. `local`: of the tokens whose residual this tensor
    rank has; the same parts without sequence parallelism."""

    parts: tuple[Part, ...]
    local: tuple[Part, ...]


def plan(banks: Banks, counts: Counts, *, padded: int, gradients: bool, chunk: tuple[int, int] = (0, 1)) -> Plan:
    """Plan of (owner, tokens) in a batch of `padded` tokens.

    With `gradients` each slot has a gradient row; probe rows have none. `chunk`: (i, n) when this rank has the i-th
    of n equal parts of the batch's residual.
    """
    owners = [owner for owner, _ in counts]
    if owners != sorted(set(owners)) or not all(n > 0 for _, n in counts):
        raise ValueError(f"counts: expected ascending owners with tokens, found {counts}")
    parts = parts_of(banks, counts, gradients=gradients)
    index, ranks = chunk
    if ranks == 1:
        return Plan(parts, parts)
    size = padded // ranks
    return Plan(parts, _local(banks, counts, index * size, (index + 1) * size, gradients=gradients))


def parts_of(banks: Banks, counts: Counts, *, gradients: bool, begin: int = 0) -> tuple[Part, ...]:
    """Of (owner, tokens) whose tokens follow each other from `begin` on."""
    found = []
    for bank, mine in banks.split(counts):
        for some in cut(mine, most=MOST_GROUPS if bank.device.type == "cuda" else None):
            found.append(_part(bank, some, begin, gradients=gradients))
            begin = found[-1].end
    return tuple(found)


def cut(counts: Counts, *, most: int | None = None) -> list[Counts]:
    """Counts of a bank, in parts for a kernel each of at most `most` slots: long runs of equal counts for themselves,
    the rest together but for wide gaps."""
    runs: list[list[tuple[int, int]]] = []
    for slot, n in counts:
        if runs and runs[-1][-1] == (slot - 1, n) and (most is None or len(runs[-1]) < most):
            runs[-1].append((slot, n))
        else:
            runs.append([(slot, n)])
    found: list[list[tuple[int, int]]] = []
    for run in runs:
        last = found[-1] if found else None
        joins = last is not None and not _long(last) and not _long(run) and run[0][0] - last[-1][0] <= _GAP
        if joins and last is not None and (most is None or run[-1][0] - last[0][0] < most):
            last.extend(run)
        else:
            found.append(run)
    return list(found)


def _long(counts: Counts) -> bool:
    """Whether a run of equal counts is long; what was joined is none."""
    return len(counts) >= _RUN and _each(counts) is not None


def _each(counts: Counts) -> int | None:
    (first, n), last = counts[0], counts[-1][0]
    return n if last - first + 1 == len(counts) and all(m == n for _, m in counts) else None


def _part(bank: Bank, counts: Counts, begin: int, *, gradients: bool) -> Part:
    stops = itertools.accumulate(n for _, n in counts)
    return Part(
        bank=bank,
        begin=begin,
        spans=tuple((slot, stop - n, stop) for (slot, n), stop in zip(counts, stops, strict=True)),
        rows=tuple(bank.gradient_row(slot) for slot, _ in counts) if gradients else (),
        each=_each(counts),
        versions=tuple((slot, bank.versions[slot]) for slot, _ in counts),
        stores=bank.stores,
    )


def _local(banks: Banks, counts: Counts, begin: int, end: int, *, gradients: bool) -> tuple[Part, ...]:
    """Of the tokens `begin..end` of a batch, counted from `begin`."""
    mine, at = [], 0
    for owner, n in counts:
        overlap = min(at + n, end) - max(at, begin)
        if overlap > 0:
            mine.append((owner, overlap))
        at += n
    return parts_of(banks, mine, gradients=gradients)


_routed: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("allele_plan", default=None)


@contextlib.contextmanager
def routed(current: Plan | None) -> Iterator[None]:
    """Run a layer under a plan. Raises StaleSlot when one of its slots was given away since it was made."""
    if current is not None:
        for part in current.parts:
            part.bank.check(part.versions, noted=part.stores)
    token = _routed.set(current)
    try:
        yield
    finally:
        _routed.reset(token)


def current() -> Plan | None:
    """The plan of the layer being run; None runs the base alone."""
    return _routed.get()
