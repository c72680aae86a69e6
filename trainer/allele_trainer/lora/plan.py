"""Which tokens of a packed batch belong to which row of the bank.

The plan travels with its micro-batch (`allele_trainer.model.batch.PackedBatch`) and is entered again by each layer:
activation recompute and pipelining run a layer later than its neighbours, and with a global plan they would apply
another micro-batch's routing (measured: gradients off by a factor of two, without an error).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from allele_trainer.bank.rows import Bank


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens are ordered by slot; those after `tokens` are padding and have no adapter.

    `spans`: (slot, first token, end) of each active slot. `offsets`: end of each group of slots `first..last-1`, empty
    ones included, for reads that take a slice of the bank; `active_offsets`: end of each group of active slots, whose
    gradients are added to the rows `active` of G.
    """

    bank: Bank
    tokens: int
    spans: tuple[tuple[int, int, int], ...]
    first: int
    last: int
    offsets: Tensor
    active: Tensor
    """Gradient row of each active slot."""
    rows: range | None
    """The same, when they follow each other."""
    active_offsets: Tensor
    scale: Tensor
    """`[T, 1]`, the factor on B·A·x of each token's adapter."""

    versions: tuple[tuple[int, int], ...]
    """(slot, its version) when the plan was made, after `stores` stores."""
    stores: int
    local: Plan | None
    """Of the tokens whose residual this tensor rank has, with sequence parallelism; None where none has an adapter."""


def plan(
    bank: Bank, counts: Sequence[tuple[int, int]], *, padded: int, gradients: bool, chunk: tuple[int, int] = (0, 1)
) -> Plan:
    """Plan of (slot, tokens) pairs in ascending order of slot, in a batch of `padded` tokens.

    With `gradients` each slot has a gradient row; probe rows have none. `chunk`: (i, n) when this rank has the i-th
    of n equal parts of the batch's residual.
    """
    slots = [slot for slot, _ in counts]
    if slots != sorted(set(slots)) or not all(n > 0 for _, n in counts):
        raise ValueError(f"counts: expected ascending slots with tokens, found {counts}")
    first, last = slots[0], slots[-1] + 1
    tokens = torch.zeros(last - first, dtype=torch.int64)
    for slot, n in counts:
        tokens[slot - first] = n
    ends = tokens.cumsum(0).to(torch.int32)
    rows = [bank.gradient_row(slot) for slot in slots] if gradients else []
    per_token = torch.repeat_interleave(torch.arange(first, last), tokens).to(bank.device)
    scale = torch.zeros(padded, 1, device=bank.device)
    scale[: per_token.numel(), 0] = bank.scale[per_token]
    stops = list(itertools.accumulate(n for _, n in counts))
    return Plan(
        bank=bank,
        tokens=per_token.numel(),
        spans=tuple((slot, stop - n, stop) for (slot, n), stop in zip(counts, stops, strict=True)),
        first=first,
        last=last,
        offsets=ends.to(bank.device),
        active=torch.tensor(rows, dtype=torch.int64).to(bank.device),
        rows=range(rows[0], rows[-1] + 1) if rows and rows == list(range(rows[0], rows[-1] + 1)) else None,
        active_offsets=ends[torch.tensor(slots) - first].to(bank.device),
        scale=scale,
        versions=tuple((slot, bank.versions[slot]) for slot in slots),
        stores=bank.stores,
        local=_local(bank, counts, padded=padded, gradients=gradients, chunk=chunk),
    )


def _local(
    bank: Bank, counts: Sequence[tuple[int, int]], *, padded: int, gradients: bool, chunk: tuple[int, int]
) -> Plan | None:
    index, parts = chunk
    if parts == 1:
        return None
    size = padded // parts
    begin, end = index * size, (index + 1) * size
    mine, at = [], 0
    for slot, n in counts:
        overlap = min(at + n, end) - max(at, begin)
        if overlap > 0:
            mine.append((slot, overlap))
        at += n
    return plan(bank, mine, padded=size, gradients=gradients) if mine else None


_routed: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("allele_plan", default=None)


@contextlib.contextmanager
def routed(current: Plan | None) -> Iterator[None]:
    """Run a layer under a plan. Raises StaleSlot when one of its slots was given away since it was made."""
    if current is not None:
        current.bank.check(current.versions, noted=current.stores)
    token = _routed.set(current)
    try:
        yield
    finally:
        _routed.reset(token)


def current() -> Plan | None:
    """The plan of the layer being run; None runs the base alone."""
    return _routed.get()
